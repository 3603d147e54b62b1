"""A table that is also the head stands in the file once, whatever it was exchanged for: bytes of tied models."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import options, record
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import taut
from taut.core.registry import METHODS
from taut.measurement.count import folder_bytes
from taut.methods.base import PartMethod
from taut.surgery.apply import steps_of

ROWS, WIDTH, LAYERS, HEADS = 4096, 256, 2, 4
KEEP = 0.3
CLAIM = "tied models keep one copy: files shrink by the dense table less the part, to the byte (Llama, GPT-2, BERT-MLM)"
METHOD_KNOBS: dict[str, dict[str, Any]] = {"two_stage": {"subvector": 8, "fine_subvector": 4}}


def models() -> dict[str, PreTrainedModel]:
    """Random weights: bytes follow from shapes alone."""
    torch.manual_seed(0)
    shared = {"vocab_size": ROWS, "tie_word_embeddings": True}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    stack = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 2 * WIDTH,
    }
    return {
        "Llama": LlamaForCausalLM(LlamaConfig(**shared, **stack)),
        "GPT-2": GPT2LMHeadModel(GPT2Config(**shared, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, **ends)),
        "BERT-MLM": BertForMaskedLM(BertConfig(**shared, **stack)),
    }


def file_bytes(model: PreTrainedModel) -> int:
    """Bytes of the tensors that ``save_pretrained`` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return folder_bytes(Path(folder)).tensors


def main() -> int:
    arguments = options(CLAIM)
    batches = [{"input_ids": torch.randint(ROWS, (32, 128), generator=torch.Generator().manual_seed(0))}]
    dense_table, rows = ROWS * WIDTH * 4, []
    methods = [name for name in METHODS.ids("embedding") if issubclass(METHODS.get(name), PartMethod)]
    for name in list(models())[: 1 if arguments.quick else None]:
        before = file_bytes(models()[name])
        for method in methods:
            short = method.partition(".")[2]
            model = models()[name]
            line = {"method": short, "keep": KEEP} | METHOD_KNOBS.get(short, {})
            taut.apply(model, {"embedding": line}, batches=batches)
            (step,) = steps_of(model)
            after = file_bytes(model)
            row = {
                "model": name,
                "method": method,
                "file": before,
                "light file": after,
                "table": dense_table,
                "part": step.cost.bytes,
                "unexplained bytes": before - after - (dense_table - step.cost.bytes),
            }
            rows.append(row | {"holds": row["unexplained bytes"] == 0})
    notes = (
        f"tables of {ROWS} x {WIDTH}, keep = {KEEP}; bytes of the tensors in the files that save_pretrained writes. "
        "Unexplained: what the file shrank by less what the plan says of the table; a second copy would show"
    )
    return record("tied_bytes", CLAIM, rows, all(row["holds"] for row in rows), notes, arguments.quick)


if __name__ == "__main__":
    raise SystemExit(main())
