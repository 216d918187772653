"""llama.cpp's converter reads a merged language model: same weights, same tokens.

LLAMA_CPP names a folder with llama.cpp's sources, whose Python requirements are installed.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from divmerge_book import __main__
from divmerge_book.models.language.models import MODELS
from transformers import AutoModelForCausalLM, AutoTokenizer

CONVERTER = Path(os.environ.get("LLAMA_CPP", "unset"), "convert_hf_to_gguf.py")


@pytest.mark.skipif(not CONVERTER.is_file(), reason="LLAMA_CPP names no folder with the converter")
def test_a_merged_language_model_is_converted_whole(tmp_path):
    base, place, converted = MODELS["smollm2"](), tmp_path / "merged", tmp_path / "merged.gguf"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    model.save_pretrained(tmp_path / "expert")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "expert")
    text = "kind: language\nbase: smollm2\ntasks: "
    text += "[{name: one, expert: expert}, {name: two, expert: expert}]\n"
    (tmp_path / "models.yaml").write_text(text)
    given = [str(tmp_path / "models.yaml"), str(place), "--method", "task_arithmetic"]
    assert __main__.main(["merge", *given]) == 0
    command = [sys.executable, str(CONVERTER), str(place), "--outtype", "f32"]
    subprocess.run([*command, "--outfile", str(converted)], check=True, timeout=250)
    both = [{"pretrained_model_name_or_path": place}]
    both += [{"pretrained_model_name_or_path": tmp_path, "gguf_file": converted.name}]
    tokenizers = [AutoTokenizer.from_pretrained(**one) for one in both]
    ids = [tokenizer("The capital is", return_tensors="pt") for tokenizer in tokenizers]
    assert torch.equal(ids[0].input_ids, ids[1].input_ids)
    models = [AutoModelForCausalLM.from_pretrained(**one, dtype=torch.float32) for one in both]
    with torch.no_grad():
        logits = [model(**ids[0]).logits for model in models]
    torch.testing.assert_close(*logits)
