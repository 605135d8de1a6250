"""A gated tiny Gemma in a local Hub: the demo model under a name of Google's; three accounts.

    python tests/demo_hub.py

serves it, to try the gate and the download without an account and without a network.
"""

from __future__ import annotations

from contextlib import suppress
from threading import Event

from gemma_serve.adapters.package_data import data_path
from local_hub import Account, FineGrained, LocalHub, Repo, serving

GATED = "google/gemma-tiny-it"
# Who accepted the licence, who did not, and who made a token for less; and a token of nobody.
ACCEPTED = "hf_AcceptedAcceptedAcceptedAccepted01"
NOT_ACCEPTED = "hf_NotAcceptedNotAcceptedNotAccept02"
NOT_FOR_GATED = "hf_NotForGatedNotForGatedNotForGat03"
UNKNOWN = "hf_UnknownUnknownUnknownUnknownUnk04"
TOKENS = (ACCEPTED, NOT_ACCEPTED, NOT_FOR_GATED, UNKNOWN)


def demo_files() -> dict[str, bytes]:
    """The files of the demo model, by name."""
    return {path.name: path.read_bytes() for path in sorted(data_path("demo").iterdir())}


def gated_hub() -> LocalHub:
    """The demo model as a gated repository, with copies of the weights that nobody needs."""
    files = demo_files() | {
        "README.md": b"# A tiny Gemma\n",
        ".gitattributes": b"*.safetensors filter=lfs\n",
        "gemma-tiny-it.gguf": bytes(1000),
        "original/model.safetensors": bytes(1000),
        "pytorch_model.bin": bytes(1000),
    }
    return LocalHub(
        repos={GATED: Repo(files, gated="manual")},
        accounts={
            ACCEPTED: Account("alice", accepted={GATED}),
            NOT_ACCEPTED: Account("bob"),
            NOT_FOR_GATED: Account(
                "carol", accepted={GATED}, fine_grained=FineGrained(can_read_gated=False)
            ),
        },
    )


def main() -> None:
    """Serve it on a port that is free until Ctrl-C, and say how to use it."""
    with serving(gated_hub()) as hub:
        print(
            f"A Hub with {GATED}, gated. In another shell:\n\n"
            f"  export HF_ENDPOINT={hub.url} HF_HOME=$(mktemp -d)\n"
            f"  unset HF_TOKEN  # nobody\n"
            f"  export HF_TOKEN={UNKNOWN}  # a token that is not valid\n"
            f"  export HF_TOKEN={NOT_ACCEPTED}  # an account that did not accept\n"
            f"  export HF_TOKEN={NOT_FOR_GATED}  # a token that may not read gated models\n"
            f"  export HF_TOKEN={ACCEPTED}  # an account that did accept\n",
            flush=True,
        )
        with suppress(KeyboardInterrupt):
            Event().wait()


if __name__ == "__main__":
    main()
