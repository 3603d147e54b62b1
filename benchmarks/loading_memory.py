"""Memory of a fresh process that loads a model whose token table dwarfs everything else, dense and compressed."""

import tempfile
from pathlib import Path

from harness import options, record

import taut
from taut.measurement.count import folder_bytes
from taut.measurement.memory import peak_memory

CLAIM = "loading a compressed folder never materialises the dense table"
ROWS, WIDTH = 200_000, 512
MODEL = (
    f"llama:vocab_size={ROWS},hidden_size={WIDTH},num_hidden_layers=2,intermediate_size=1024,"
    "num_attention_heads=8,num_key_value_heads=8,tie_word_embeddings=true"
)
RECIPES = {
    "dense": None,
    "int8, rows": {"embedding": {"method": "low_bit", "bits": 8}},
    "int4, rows": {"embedding": {"method": "low_bit", "bits": 4}},
    "int4, groups of 64": {"embedding": {"method": "low_bit", "bits": 4, "group": 64}},
    "low-rank .25": {"embedding": {"method": "low_rank", "keep": 0.25}},
}
TOKENS = 8
MARGIN = 0.25
"""The share of the float32 table that loading may need beside the weights of the file. In bfloat16 it is one half."""


def main() -> int:
    arguments = options(CLAIM)
    table = ROWS * WIDTH * 4
    rows = []
    for name, recipe in list(RECIPES.items())[: 2 if arguments.quick else None]:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            if recipe is None:
                taut.load(MODEL).save_pretrained(folder)
            else:
                taut.apply(MODEL, recipe, folder)
            weights = folder_bytes(folder).tensors
            for dtype in (None, "bfloat16"):
                found = peak_memory(folder, length=TOKENS, dtype=dtype)
                peak = found["peak"].value
                row = {
                    "table": name,
                    "loaded as": dtype or "float32",
                    "files MB": weights / 1e6,
                    "peak MB": peak / 1e6,
                    "forward MB": found["forward"].value / 1e6,
                    "dense table MB": table / 1e6,
                    "beside the weights / dense table": (peak - weights) / table,
                }
                if name.startswith("int"):
                    row["holds"] = peak < table and peak - weights <= MARGIN * table
                rows.append(row)
    notes = (
        f"{ROWS} x {WIDTH} table, tied head. peak: loading, touching every weight, and a forward pass of {TOKENS} "
        "tokens, beyond the bare process with its libraries; 'forward' is the pass alone. 'holds': the whole peak is "
        f"below the dense table's bytes, and beside the file's weights less than {MARGIN:g} of them. Dense, low-rank "
        "stand beside, without a promise: float tensors of a file are copied to aligned memory, and until loading ends "
        "the mapped file counts as well as the copy"
    )
    return record("loading_memory", CLAIM, rows, all(row.get("holds", True) for row in rows), notes, arguments.quick)


if __name__ == "__main__":
    raise SystemExit(main())
