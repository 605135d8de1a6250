"""The smoke test of a running endpoint: `run_smoke` in `run`, its checks beside it."""
