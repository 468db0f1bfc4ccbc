"""An exported folder on the Hub."""

from __future__ import annotations

from pathlib import Path

from longrope.errors import UserError


def push_folder(folder: Path, name: str) -> str:
    """Upload a folder to a repository, which is made (private) where there is none; returns its address.

    Raises UserError when the Hub refuses: no such user, no token, a name that is none.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Exported by longrope")
    except Exception as error:  # of the name, the network, the token and the Hub, each of its own class
        got, rule = f"{name}, which the Hub does not take", " ".join(str(error).split())[:240]
        do = f"the export is whole in {folder}: log in with `hf auth login`, and give USER/NAME"
        raise UserError("--push", got=got, rule=rule, do=do) from None
    return str(address)
