"""Libraries that are imported before the packages: it saves seven seconds in every test process.

What a package under the type checker's hook imports is compiled from its source each time; these
come from their compiled files.
"""

import importlib
import os
import sys

import torch

# Without a GPU, Triton's kernels run in its interpreter; it has to know before it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A grammar of IRIs that jsonschema compiles for four seconds; nothing here holds an IRI.
sys.modules["rfc3987_syntax"] = None

for name in (
    *("IPython.display", "accelerate", "beartype.claw", "huggingface_hub", "matplotlib.pyplot"),
    *("jupyter_client.manager", "papermill", "pydantic", "rouge_score.rouge_scorer"),
    *("scipy.cluster.vq", "scipy.stats", "seaborn", "torch._dynamo", "torch.distributed.fsdp"),
    *("transformers.generation", "transformers.modeling_utils", "transformers.pytorch_utils"),
):
    importlib.import_module(name)
