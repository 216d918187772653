"""The suite `t5_generation`: T5 experts that write, on IMDB, QASC, SQuAD and CommonGen.

Every expert answers unlabelled prompts of its task once, greedily; merging compares distributions
over the vocabulary at these answers' positions in the decoder. What a merge writes is scored by
ROUGE-1, as in the paper (DivMerge, section 4).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from divmerge_book.data.code_digest import code_digest, key_of
from divmerge_book.evaluation.experiment import Experiment, States
from divmerge_book.evaluation.language_scoring import written_split
from divmerge_book.models.encoders import check_device, resolve
from divmerge_book.models.finetuning import Expert, data_digest
from divmerge_book.models.language.completions import completions
from divmerge_book.models.language.forward import language_forward
from divmerge_book.models.language.models import Language, check_tensors, load_language
from divmerge_book.models.language.prompts import Prompt
from divmerge_book.published.sources import SOURCES, PublishedTask, distinct_tasks, task_of
from divmerge_book.user_models.description import SPLITS
from divmerge_book.user_models.language_tokens import Reading
from divmerge_book.user_models.vocabulary import reading_gap
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.storage import cache_dir

SUITE = "t5_generation"
BASE = "google-t5/t5-base"


def tokenizer_gap(
    base: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, texts: Sequence[str]
) -> str | None:
    """How an expert's tokenizer differs from the base's, on these texts; None where it does not."""
    ours, theirs = base.get_vocab(), own.get_vocab()
    if moved := sorted(t for t in {*ours, *theirs} if ours.get(t) != theirs.get(t)):
        return f"its vocabulary differs from the base's in {len(moved)} tokens, such as {moved[:3]}"
    return reading_gap(base, Reading("", own, len(own), texts))


def read_expert(base: Language, name: str, source: PublishedTask, texts: Sequence[str]) -> Expert:
    """A task's expert, held to the base.

    Raises ValueError where its tensors have other names or shapes, or its tokenizer has another
    vocabulary, other special tokens, or cuts up these texts in another way: the same number would
    mean another token.
    """
    other = load_language(source.expert, device=str(base.device))
    if gap := tokenizer_gap(base.tokenizer, other.tokenizer, texts):
        raise ValueError(
            f"expert {source.expert}: {gap}; merging needs experts that read and write the tokens "
            "of the base"
        )
    check_tensors(base, other.state, f"expert {source.expert}")
    manifest = {"task": name, "encoder": base.name, "base": base.digest, "from": source.expert}
    manifest |= {"answers": [], "precision": "float32", "model.safetensors": other.digest}
    return Expert(name, other.state, {}, manifest)


def prepare_t5(
    tasks: Sequence[str] = tuple(SOURCES),
    *,
    base: str = BASE,
    sources: Mapping[str, PublishedTask] = SOURCES,
    rows: Mapping[str, int] | None = None,
    max_length: int = 512,
    max_new: int = 64,
    device: str = "cpu",
    precision: str = "float32",
    top: int | None = None,
    progress: bool = True,
) -> Experiment:
    """Base, experts, their greedy answers to unlabelled rows (kept on disk), and splits by ROUGE-1.

    rows: at most so many of `merge`, `validation` and `test`. max_length: tokens of a prompt; the
    longer of its texts loses its end. max_new: tokens of an answer; one that has not ended by then
    is used as far as it goes. top: keep an expert's likeliest answers only (see TopKLogProbs).
    Raises ValueError for what is unknown, cannot be read or does not belong together.
    """
    names, place = distinct_tasks(SUITE, tasks, sources), check_device(device)
    settings = {"max_length": max_length, "max_new": max_new}
    settings["precision"] = resolve(precision, place)
    language, limits = load_language(base, device=device), rows or {}
    experts, answers, validation, test, digests = [], [], [], [], []
    for name in (bar := tqdm(names, SUITE, disable=not progress, leave=False)):
        bar.set_postfix_str(name)
        task, prompt = task_of(name, sources[name]), Prompt(name, sources[name].template)
        parts = {split: task.load(split) for split in SPLITS}  # rows in random order
        parts = {s: part.select(range(len(part))[: limits.get(s)]) for s, part in parts.items()}
        few = {split: part.to_list() for split, part in parts.items()}
        asked = [prompt.ask(row) for row in few["merge"]]
        expert = read_expert(language, name, sources[name], asked)
        kept = {"key": [SUITE, expert.manifest["model.safetensors"]], "top": top}
        given = (language, expert.state, prompt, few["merge"])
        answers.append(completions(*given, **kept, progress=progress, **settings))
        validation.append(written_split(language, prompt, few["validation"], **settings))
        test.append(written_split(language, prompt, few["test"], **settings))
        digests.append([data_digest(part) for part in parts.values()])
        experts.append(replace(expert, state={}))

    def load(name: str) -> Expert:  # again, so that one expert is in memory at a time
        return read_expert(language, name, sources[name], ())

    vectors = TaskVectors.from_states(language.state, States(names, load))
    forward = language_forward(language.model, precision=settings["precision"])
    problem = MergeProblem(vectors, [one.batches for one in answers], forward, language.model)
    weights = [expert.manifest["model.safetensors"] for expert in experts]
    what = (names, weights, digests, language.digest, settings, top, place.type)
    key, folder = key_of(code_digest(prepare_t5), what), cache_dir() / "unfinished"
    return Experiment(language, experts, problem, validation, test, key, folder, test, answers)
