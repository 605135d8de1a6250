"""Pure decisions: configuration, model facts, GPUs, the engine's command line. No I/O."""
