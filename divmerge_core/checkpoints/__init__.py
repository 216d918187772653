"""A merged model on disk: written in shards, the whole folder or nothing, with its heads.

from divmerge_core.checkpoints import Head, MergeRecord, write

record = MergeRecord(method="divmerge/layer", tasks=("mood", "place"), base=Path("models/base"))
write("merged", record, merged=layout.unflatten(flat), heads={"mood": Head(head, labels)})
"""

from divmerge_core.checkpoints.heads import Head, load_head
from divmerge_core.checkpoints.model_card import MergeRecord
from divmerge_core.checkpoints.save import write

__all__ = ["Head", "MergeRecord", "load_head", "write"]
