"""What a user may get wrong. Every wrong line has an ignore comment, and an unneeded one makes the lint fail."""

import taut

model = taut.load("minilm")
recipe = {"embedding": "low_bit"}

taut.plann("minilm", recipe)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
taut.plan("minilm")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
taut.plan("minilm", recipe, "long")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
print(taut.plan("minilm", recipe).stepz)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
taut.apply(model, recipe, outt="folder")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
taut.apply(model, 3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
taut.apply("minilm", recipe, heal={"batch": 8})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
taut.heal(model, model, stepps=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
taut.heal(model, model, by="row")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
taut.load("minilm", "bfloat16")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
taut.evaluate("minilm", task=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
taut.context(["minilm"], longst=64)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
taut.measure("minilm", lenght=64)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
taut.measure("minilm", repeats="ten")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
taut.compare("minilm", ["light"], seed=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
taut.compare("minilm", ["light"], dtype="int8")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
taut.index("minilm", ["a text"], code="int9")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
taut.methods(4)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
taut.footprint(4)  # pyright: ignore[reportArgumentType]
taut.Recipe(embeding="low_bit")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
taut.Recipe(memory=4)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
taut.tokenizer(4)  # pyright: ignore[reportArgumentType]
