"""Users' experts and texts: described in one file, checked, merged, written to disk.

    from divmerge_book.user_models import check, load, merge_and_score, read, write_merged

    methods = ["average", "divmerge/layer"]
    plan = check(read("my_models.yaml"), methods)  # reads no weights; errors name file and line
    bench = load(plan)                             # base, task vectors, inputs, labelled rows
    found = merge_and_score(bench, methods)
    write_merged(plan, bench, found, "divmerge/layer", "merged/")

The description (YAML or JSON; relative paths start at its own folder):

    base: models/bert              # folder, hub name, or a packaged encoder such as bert_tiny
    max_length: 128                # tokens; longer inputs are cut
    pad_token: <|endoftext|>       # only where neither base nor experts name one, as with GPT-2
    storage: int8                  # of task vectors in memory; default: float32. low_rank keeps the
                                   # factors of adapters, streamed leaves a GPU's in the host's
    tasks:
      - name: questions
        expert: models/questions   # transformers checkpoint, PEFT LoRA folder, or our own expert
        merge: data/questions.csv  # unlabelled; only for methods that read inputs
        validation: data/qv.csv    # labelled; without it methods keep their published options
        test: data/qt.csv          # labelled; .csv, .tsv, .jsonl, .parquet, datasets folder
        columns: {text: question, pair: context, label: kind}
        labels: [person, place]    # in the order of the model's outputs; else from its config

`kind: language` merges language models, whose answers are text: see `language`. An expert is a
folder, or a hub name with a revision (`organisation/model@v2`).
"""

from divmerge_book.user_models.checking import check
from divmerge_book.user_models.description import Description, TaskFiles, locate, read
from divmerge_book.user_models.load import load
from divmerge_book.user_models.plan import Plan
from divmerge_book.user_models.result import MergeResult, closeness, merge_and_score, task_scores
from divmerge_book.user_models.save import merge_described, target, write_merged
