"""Classifies texts, with a linear probe on frozen vectors or by a short fine-tuning."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from scipy.sparse import csr_array
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taut import data
from taut.core.errors import TautError
from taut.core.progress import Progress
from taut.core.record import Score
from taut.evaluation._encode import encode, pool, states, token_ids, usable_length
from taut.evaluation._probe import probe
from taut.evaluation.task import Task, TaskOptions, reads_text

HEAD_LEARNING_RATE = 1e-3


class ClassifyOptions(TaskOptions):
    """Options of classify."""

    data: str = Field("sst2", description="a name such as sst2, cola, trec, or a file with one text and label per row")
    train: str | None = Field(None, description="file to train on; else the train split, or 3 of 4 rows of the data")
    columns: str | None = Field(None, description="TEXT,LABEL by header or position; by default guessed if unambiguous")
    limit: int | None = Field(1000, ge=1, description="rows to evaluate on, from the start of the fixed order")
    train_limit: int | None = Field(2000, ge=2, description="rows to train on, from the start of the fixed order")
    max_length: int = Field(128, ge=2, description="tokens kept of each text, special tokens included")
    mode: Literal["probe", "finetune"] = Field("probe", description="train only a linear map, or also the model")
    epochs: int = Field(1, ge=1, description="finetune: passes over the training rows")
    learning_rate: float = Field(5e-5, gt=0, description="finetune: learning rate of the model; its new head has 1e-3")
    train_batch_size: int = Field(16, ge=1, description="finetune: rows per step")


class Classify(Task):
    """Accuracy, and for two classes Matthews' correlation.

    Training rows whose text is also an evaluation row are left out.
    """

    id = "classify"
    summary = "classify texts by a linear probe or a short fine-tuning (accuracy, Matthews' correlation)"
    Options: ClassVar[type[TaskOptions]] = ClassifyOptions

    def fits(self, model: PreTrainedModel) -> str | None:
        return reads_text(model)

    def evaluated(self) -> data.Data:
        return self.splits()[1]

    def scores(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        progress: Progress,
        reference: PreTrainedModel | None,
    ) -> tuple[Score, ...]:
        train, evaluation = self.splits()
        classes = sorted(set(train.column(1)))
        if len(classes) < 2:
            raise TautError(
                f"task {self.id}: all training rows of {self.options.data} have the label {classes[0]!r}; expected two "
                "labels or more"
            )
        labels = np.array([classes.index(label) for label in train.column(1)])
        # A label without training rows gets class -1, so every prediction for its rows is wrong.
        gold = np.array([classes.index(label) if label in classes else -1 for label in evaluation.column(1)])
        texts = (train.column(0), evaluation.column(0))
        if self.options.mode == "probe":
            predicted, how = self._probe(model, tokenizer, texts, labels, len(classes), progress)
        else:
            predicted, how = self._finetune(model, tokenizer, texts, labels, len(classes), progress, seed)
        how += f", {len(labels)} training rows ({train.sha256[:12]})"
        guesses = {
            "majority": np.full(len(gold), Counter(labels.tolist()).most_common(1)[0][0]),
            "bag_of_words": probe(*_bags(texts, labels), len(classes))[0],
        }
        facts = evaluation.facts()
        scores = [
            self.score(
                "accuracy",
                "share",
                f"{how}; samples: 1 if correct, else 0",
                (predicted == gold).astype(float).tolist(),
                "higher",
                facts,
                {name: float((guess == gold).mean()) for name, guess in guesses.items()},
            )
        ]
        if len(classes) == 2 and gold.min() >= 0:
            scores.append(
                self.score(
                    "matthews",
                    "correlation",
                    f"{how}; samples: product of standardised label and prediction; their mean is the correlation",
                    correlation_products(predicted, gold),
                    "higher",
                    facts,
                    {name: float(np.mean(correlation_products(guess, gold))) for name, guess in guesses.items()},
                )
            )
        return tuple(scores)

    def splits(self) -> tuple[data.Data, data.Data]:
        """Rows (text, label) for training and for evaluation: the published splits, or 3 to 1 in hashed order."""
        options = self.options
        if options.train is not None:
            train = data.labelled(options.train, columns=options.columns)
            evaluation = data.labelled(options.data, options.split, options.columns)
        elif options.data in data.NAMED and "train" in data.NAMED[options.data].files:
            if options.split == "train":
                raise TautError(
                    f"task {self.id}: split train of {options.data} is used for training; evaluate on another split"
                )
            train = data.labelled(options.data, "train", options.columns)
            evaluation = data.labelled(options.data, options.split, options.columns)
        else:
            whole = data.labelled(options.data, options.split, options.columns)
            quarter = max(1, len(whole.rows) // 4)
            evaluation = data.Data(whole.source, f"{whole.split}, first quarter", whole.rows[:quarter])
            train = data.Data(whole.source, f"{whole.split}, last three quarters", whole.rows[quarter:])
        evaluation = evaluation.head(options.limit)
        seen = set(evaluation.column(0))
        rows = tuple(row for row in train.rows if row[0] not in seen)
        train = data.Data(train.source, train.split, rows).head(options.train_limit)
        if not evaluation.rows or len(train.rows) < 2:
            raise TautError(
                f"task {self.id}: {options.data} leaves {len(train.rows)} rows for training and "
                f"{len(evaluation.rows)} for evaluation; expected at least 2 and 1"
            )
        return train, evaluation

    def _probe(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: tuple[list[str], list[str]],
        labels: np.ndarray,
        classes: int,
        progress: Progress,
    ) -> tuple[np.ndarray, str]:
        vectors = encode(
            model,
            tokenizer,
            [*texts[0], *texts[1]],
            max_length=self.options.max_length,
            batch_size=self.options.batch_size,
            progress=progress,
            normalise=False,
        ).double().numpy()  # fmt: skip
        train, evaluation = vectors[: len(labels)], vectors[len(labels) :]
        mean, deviation = train.mean(0), train.std(0)
        deviation[deviation == 0] = 1.0
        # Scale the features to variance 1 / D, so that the penalty does not depend on the model's width D.
        scale = deviation * np.sqrt(train.shape[1])
        predicted, strength = probe((train - mean) / scale, labels, (evaluation - mean) / scale, classes)
        return predicted, f"logistic regression on frozen mean-pooled vectors, C = {strength:g} chosen on training rows"

    def _finetune(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: tuple[list[str], list[str]],
        labels: np.ndarray,
        classes: int,
        progress: Progress,
        seed: int,
    ) -> tuple[np.ndarray, str]:
        options = self.options
        length = usable_length(model, tokenizer, options.max_length)
        ids = token_ids(tokenizer, texts[0], length)
        targets = torch.tensor(labels, device=model.device)
        total = len(ids) * options.epochs + len(texts[1])
        with _restored(model), torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(seed)
            head = nn.Linear(_width(model, tokenizer, ids[:1]), classes, device=model.device)
            trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
            groups = [{"params": trainable, "lr": options.learning_rate}] if trainable else []
            optimiser = torch.optim.AdamW([*groups, {"params": head.parameters(), "lr": HEAD_LEARNING_RATE}])
            model.train()
            done = 0
            for _ in range(options.epochs):
                for batch in torch.randperm(len(ids)).split(options.train_batch_size):
                    hidden, mask = states(model, tokenizer, [ids[index] for index in batch.tolist()])
                    loss = nn.functional.cross_entropy(head(pool(hidden, mask)), targets[batch.to(targets.device)])
                    optimiser.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_([*trainable, *head.parameters()], 1.0)
                    optimiser.step()
                    done += len(batch)
                    progress(done, total)
            model.eval()
            vectors = encode(
                model,
                tokenizer,
                texts[1],
                max_length=options.max_length,
                batch_size=options.batch_size,
                progress=progress,
                done=done,
                total=total,
                normalise=False,
            )
            with torch.inference_mode():
                predicted = head(vectors.to(model.device)).argmax(-1).cpu().numpy()
        return predicted, f"fine-tuned, {options.epochs} epochs, learning rate {options.learning_rate:g}, seed {seed}"


def correlation_products(predicted: np.ndarray, gold: np.ndarray) -> list[float]:
    """Two (M,) arrays of 0 and 1 -> M products of standardised values; their mean is Matthews' correlation.

    All are 0 if one side is constant, by the usual convention.
    """
    if predicted.std() == 0 or gold.std() == 0:
        return [0.0] * len(gold)
    standard = [(values - values.mean()) / values.std() for values in (predicted, gold)]
    return (standard[0] * standard[1]).tolist()


def _bags(texts: tuple[list[str], list[str]], labels: np.ndarray) -> tuple[csr_array, np.ndarray, csr_array]:
    """Sparse float64 bags of words (N, W) and (M, W), with the labels between them.

    An entry is 1 if the text contains the word. The W words are those of the training texts.
    """
    split = [[set(text.lower().split()) for text in side] for side in texts]
    vocabulary = {word: index for index, word in enumerate(sorted(set().union(*split[0])))}
    tables = []
    for side in split:
        entries = [
            (row, vocabulary[word]) for row, words in enumerate(side) for word in sorted(words & set(vocabulary))
        ]
        places = np.array(entries, dtype=int).reshape(-1, 2).T
        tables.append(csr_array((np.ones(len(entries)), (places[0], places[1])), shape=(len(side), len(vocabulary))))
    return tables[0], labels, tables[1]


@torch.no_grad()
def _width(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[list[int]]) -> int:
    return states(model, tokenizer, ids)[0].shape[-1]


@contextmanager
def _restored(model: PreTrainedModel) -> Iterator[None]:
    """Restore the values of all parameters and buffers, and all gradients, at the end, even after an error."""
    tensors = [*model.parameters(), *model.buffers()]
    values = [tensor.detach().clone() for tensor in tensors]
    gradients = [parameter.grad for parameter in model.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
