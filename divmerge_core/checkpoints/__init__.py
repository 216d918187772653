"""A merged model on disk: written in shards, all or nothing, and loaded again with its heads.

from divmerge_core.checkpoints import Head, MergeRecord, load_with_head, write

record = MergeRecord(method="divmerge/layer", tasks=("mood", "place"), base=Path("models/base"))
write("merged", record, merged=layout.unflatten(flat), heads={"mood": Head(head, labels)})
model = load_with_head("merged", "mood")
"""

from divmerge_core.checkpoints.heads import Head, load_with_head
from divmerge_core.checkpoints.model_card import MergeRecord
from divmerge_core.checkpoints.save import base_folder, write

__all__ = ["Head", "MergeRecord", "base_folder", "load_with_head", "write"]
