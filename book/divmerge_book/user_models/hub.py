"""The folder of a model by its name: here, packaged, kept by the hub's client, or fetched."""

import re
from pathlib import Path

import huggingface_hub

from divmerge_book.models.merged import base_folder
from divmerge_book.models.mergekit_folders import FILES

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@.+)?")  # organisation/name, maybe with a revision


def fetched(name: str) -> Path:
    """The folder of a local, packaged or cached model; else its files are fetched from the hub.

    `name@revision` is the hub's model at a branch, tag or commit.
    """
    repository, _, revision = name.partition("@")
    try:
        if revision:
            raise ValueError(f"there is no folder {name!r}")
        return base_folder(name)
    except ValueError:
        named = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository)
        if not named or Path(name).expanduser().is_dir():
            raise
        try:
            given = {"revision": revision or None, "allow_patterns": FILES}
            return Path(huggingface_hub.snapshot_download(repository, **given))
        except Exception as cause:  # the client raises many kinds: no network, no such name
            raise ValueError(
                f"{name!r} is neither a folder beside the description nor a packaged model, and "
                f"the hub gave none ({cause!r:.200})"
            ) from cause
