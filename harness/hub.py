"""Repositories of the Hugging Face hub as local folders."""

from pathlib import Path

from huggingface_hub import snapshot_download

from harness.errors import UserError, one_line


def fetch(name: str, *patterns: str, kind: str = "model") -> Path:
    """The local copy of the repository OWNER/NAME: a folder with the files that match `patterns`, or with all files.

    Missing files are downloaded. Offline, the copy in the hub's cache is used.

    Raises:
        UserError: it cannot be fetched.
    """
    try:
        return Path(snapshot_download(name, repo_type=kind, allow_patterns=list(patterns) or None))
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(f"{kind} {name}: could not be fetched from the hub: {one_line(error)}") from error
