"""What a user writes. Type checkers read it (make lint); it is never run."""

from pathlib import Path

import taut

PARTS = {"embedding": {"method": "low_rank", "keep": 0.5}, "feedforward": "low_bit"}

print(taut.__version__, [row["id"] for row in taut.methods("memory")])

try:
    plan = taut.plan("minilm", "light.yaml", length=128)
except taut.TautError as error:
    raise SystemExit(str(error)) from None
print(plan.before.bytes, plan.after.bytes, len(plan.steps))

model = taut.apply("minilm", PARTS, out=Path("minilm-light"), heal={"steps": 50, "by": "layer"}, dtype="float32")
original = taut.load("minilm")
encoder = taut.vectors(original)
print(taut.footprint(model), taut.show("minilm-light")["recipe"])

record = taut.heal(
    taut.apply(taut.load("minilm"), PARTS), original, ["a text"], 10, tokenizer=encoder.tokenizer, train="norms", rank=4
)
print(record["loss_last"])

for score in taut.evaluate(model, "sts", tokenizer=encoder.tokenizer, data="stsb:dev", limit=100):
    print(score.task, score.metric, score.quantity.value)

costs = taut.measure("minilm-light", against="minilm", batch=8, length=64, repeats=10)
print(costs["latency_prefill_ratio"].value)

contexts = taut.context(["decoder", original], longest=256, hardest=0.2, tokenizer=encoder.tokenizer)
print(contexts.to_dict())

outcome = taut.compare("minilm", ["light"], tasks=["agreement"], seeds=[0, 1], dtype="bfloat16", report="report.html")
print(outcome.sentence(), len(outcome.rows))

index = taut.index("minilm", ["a text", "another"], "index", code="pq", bytes=16, finer="int8")
print(len(index), taut.search("index", ["query"], k=1)[0][0]["text"])
print(encoder.encode(["a text"]).shape)

text = taut.generate("decoder", "Once", prefix=taut.prefix("decoder", "Upon"), tokens=8).text
print(text.upper(), taut.undo(model).config)

recipe = taut.Recipe(embedding={"method": "low_bit", "bits": 4}, feedforward=["low_bit"], memory="low_bit")
print(taut.plan("decoder", recipe), taut.tokenizer("decoder").vocab_size)
