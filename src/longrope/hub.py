"""Whether the Hub answers here, asked once: its libraries repeat every request that fails for half a minute."""

from __future__ import annotations


def hub_answers() -> bool:
    """Whether the Hub can be reached; without a network only its cache on this disk can be read."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # no network, no name service, a proxy that refuses, offline mode: each has its own
        return False
    return True
