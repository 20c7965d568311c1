"""A Predictor answers as a plain loop in evaluation mode computes, whatever way batches and outputs come."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="models are torch's")
from serving import Points, linear, summed  # noqa: E402
from torch import nn  # noqa: E402

from trainfleet.errors import ConfigError, DataError  # noqa: E402
from trainfleet.serve.answer import checked_answer  # noqa: E402
from trainfleet.serve.predictor import Predictor, digest_of  # noqa: E402
from trainfleet.serve.terms import Answering, Terms  # noqa: E402

VALIDATE, PREDICT = Terms(task="validate"), Terms(task="predict", top_k=3, probabilities=True)
POINTS = Points(40)
BATCH = {"input": torch.tensor(POINTS.inputs), "target": torch.tensor(POINTS.labels)}


def plain(model: nn.Module, inputs: torch.Tensor = BATCH["input"]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(inputs).softmax(-1)


def test_a_predictor_is_an_answering():
    assert isinstance(Predictor(linear()), Answering)


def test_predictions_are_those_of_a_plain_loop():
    answer = checked_answer(Predictor(linear()).answer(BATCH, PREDICT), PREDICT)
    expected = plain(linear())
    best, classes = expected.topk(3)
    assert (answer["probabilities"] == expected.numpy()).all() and answer["kept"].tolist() == list(range(40))
    assert (answer["classes"] == classes.numpy()).all() and (answer["confidences"] == best.numpy()).all()


def test_confidence_filters_and_tells_which_rows_were_kept():
    terms = Terms(task="predict", confidence=0.3)
    answer = checked_answer(Predictor(linear()).answer(BATCH, terms), terms)
    best = plain(linear()).max(-1).values
    assert 0 < len(answer["kept"]) < 40 and set(answer) == {"rows", "kept", "num_classes", "classes", "confidences"}
    assert answer["kept"].tolist() == (best >= 0.3).nonzero().flatten().tolist()


@pytest.mark.parametrize("told", ["numpy", "pair", "plain", "weighted", "third", "logits", "object", "tuple", "double"])
def test_batches_and_outputs_come_in_many_ways(told):
    batch, forward = dict(BATCH), None
    weight = torch.ones(40)
    if told == "numpy":
        batch = {name: array.numpy() for name, array in BATCH.items()}
        batch["input"].flags.writeable = False
    elif told in ("pair", "third"):
        batch = (BATCH["input"], BATCH["target"], weight)[: 3 if told == "third" else 2]
    elif told == "plain":
        batch = BATCH["input"]
    elif told == "weighted":
        batch["weight"] = weight
    elif told == "double":
        batch["input"] = BATCH["input"].float()
    elif told == "logits":
        forward = lambda model, batch: {"loss": 0, "logits": model(batch["input"])}  # noqa: E731
    elif told == "tuple":
        forward = lambda model, batch: (model(batch["input"]), None)  # noqa: E731
    elif told == "object":
        forward = lambda model, batch: type("Output", (), {"logits": model(batch["input"])})()  # noqa: E731
    answer = Predictor(linear(), forward=forward).answer(batch, PREDICT)
    assert (checked_answer(answer, PREDICT)["probabilities"] == plain(linear()).numpy()).all()


def test_rows_of_weight_0_and_labels_left_out_count_nowhere():
    weight = torch.ones(40)
    weight[[3, 17]] = 0
    labels = BATCH["target"].clone()
    labels[5] = -100
    batch = {"input": BATCH["input"], "target": labels, "weight": weight}
    predictor = Predictor(linear())
    kept = checked_answer(predictor.answer(batch, PREDICT), PREDICT)["kept"]
    assert kept.tolist() == [row for row in range(40) if row not in (3, 17)]
    sure = predictor.answer(batch, Terms(task="predict", confidence=0.01))["kept"]
    assert sure.tolist() == kept.tolist()
    answer = checked_answer(predictor.answer(batch, VALIDATE), VALIDATE)
    assert int(answer["counts"].sum()) == 37 and int(answer["rows"]) == 40


def test_a_label_beyond_the_classes_is_refused():
    for label in (7, -1):
        batch = {"input": BATCH["input"], "target": torch.full((40,), label)}
        with pytest.raises(DataError, match=f"Labels go from {label} to {label}, and the model has 7 classes"):
            Predictor(linear()).answer(batch, VALIDATE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_are_scored_in_float32(dtype):
    model = linear().to(dtype)
    batch = {"input": BATCH["input"].to(dtype), "target": BATCH["target"]}
    answer = checked_answer(Predictor(model, loss_fn=summed).answer(batch, PREDICT), PREDICT)
    with torch.no_grad():
        expected = model(batch["input"]).float().softmax(-1)
    assert (answer["probabilities"] == expected.numpy()).all()
    loss = Predictor(model, loss_fn=summed).answer(batch, VALIDATE)["loss"]
    with torch.no_grad():
        assert loss[0] == float(summed(model(batch["input"]).float(), batch).total) and loss[1] == 40


def test_one_logit_is_two_classes_by_the_sigmoid():
    labels = BATCH["target"] % 2
    answer = Predictor(linear(1)).answer({"input": BATCH["input"], "target": labels}, Terms(task="predict", top_k=2))
    with torch.no_grad():
        sure = torch.sigmoid(linear(1).eval()(BATCH["input"]))[:, 0].numpy()
    two = np.stack([1 - sure, sure], 1)
    np.testing.assert_allclose(answer["confidences"], np.sort(two, 1)[:, ::-1], atol=1e-6)
    assert (answer["classes"][:, 0] == (sure > 0.5)).all()
    flat = Predictor(linear(1), forward=lambda model, batch: model(batch["input"])[:, 0])
    alike = flat.answer({"input": BATCH["input"], "target": labels}, Terms(task="predict", top_k=2))
    assert all((alike[name] == answer[name]).all() for name in ("classes", "confidences"))
    floats = {"input": BATCH["input"], "target": labels.float()[:, None]}
    counts = checked_answer(Predictor(linear(1), classes=2).answer(floats, VALIDATE), VALIDATE)
    assert int(counts["counts"][counts["pairs"] % 3 == 0].sum()) == ((sure > 0.5) == labels.numpy()).sum()


def test_one_number_a_row_without_labels_has_to_be_explained():
    with pytest.raises(ConfigError, match="logit of two classes or a value"):
        Predictor(linear(1)).answer(BATCH["input"], Terms(task="predict"))
    values = Predictor(linear(1), classes=0).answer(BATCH["input"], Terms(task="predict"))["values"]
    assert values.shape == (40,) and values.dtype == np.float32


@pytest.mark.parametrize(
    ("asked", "said"), [({"top_k": 2}, "top_k"), ({"confidence": 0.5}, "confidence"), ({"probabilities": True}, "prob")]
)
def test_what_values_do_not_have_is_refused(asked, said):
    with pytest.raises(ConfigError, match=said):
        Predictor(linear(2), classes=0).answer(BATCH, Terms(task="predict", **asked))


def test_more_classes_than_there_are_is_refused():
    with pytest.raises(ConfigError, match="top_k is 8, and the model has 7 classes"):
        Predictor(linear()).answer(BATCH, Terms(task="predict", top_k=8))


def test_sequences_are_counted_by_position_and_not_predicted():
    inputs = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 7, (4, 5), generator=torch.Generator().manual_seed(1))
    labels[0, 2:] = -100
    answer = checked_answer(Predictor(linear()).answer({"input": inputs, "target": labels}, VALIDATE), VALIDATE)
    assert int(answer["counts"].sum()) == 17
    right = (plain(linear(), inputs).argmax(-1) == labels).sum()
    assert int(answer["counts"][answer["pairs"] // 7 == answer["pairs"] % 7].sum()) == int(right)
    with pytest.raises(ConfigError, match="one row of classes"):
        Predictor(linear()).answer({"input": inputs}, Terms(task="predict"))


def test_labels_in_a_column_are_labels():
    column = {"input": BATCH["input"], "target": BATCH["target"][:, None]}
    whole, found = (Predictor(linear()).answer(batch, VALIDATE) for batch in (BATCH, column))
    assert (whole["pairs"] == found["pairs"]).all() and (whole["counts"] == found["counts"]).all()


def test_batches_without_labels_are_predicted_and_not_validated():
    assert len(Predictor(linear()).answer({"input": BATCH["input"]}, PREDICT)["kept"]) == 40
    with pytest.raises(DataError, match="no labels"):
        Predictor(linear()).answer({"input": BATCH["input"]}, VALIDATE)


def test_outputs_that_fit_no_labels_are_refused():
    with pytest.raises(DataError, match="one each is needed"):
        Predictor(linear(), forward=lambda model, batch: model(batch["input"])[:3]).answer(BATCH, PREDICT)
    with pytest.raises(DataError, match="classes stand on the last dimension"):
        Predictor(linear()).answer({"input": BATCH["input"], "target": BATCH["target"].expand(2, 40).T}, VALIDATE)
    with pytest.raises(DataError, match="must return a tensor"):
        Predictor(linear(), forward=lambda model, batch: "text").answer(BATCH, PREDICT)


def test_prepare_comes_first_and_the_loss_sees_what_it_made():
    def prepare(batch):
        return {"input": batch["input"].float() / 2, "target": batch["target"]}

    whole = {"input": BATCH["input"].double(), "target": BATCH["target"]}
    answer = Predictor(linear(), loss_fn=summed, prepare=prepare).answer(whole, PREDICT)
    assert (answer["probabilities"] == plain(linear(), BATCH["input"] / 2).numpy()).all()


def test_the_digest_is_of_names_and_bytes():
    assert digest_of(linear()) == digest_of(linear()) == Predictor(linear()).digest
    changed = linear()
    with torch.no_grad():
        changed[0].weight[0, 0].add_(1e-7)
    reshaped = nn.Sequential(nn.Linear(16, 6), nn.Linear(6, 16))
    assert len({digest_of(model) for model in (linear(), changed, linear(6), reshaped, linear().bfloat16())}) == 5
    assert len(digest_of(linear())) == 32


def test_the_digest_tells_shapes_and_dtypes_apart_and_no_order_of_making():
    def model(**arrays):
        made = nn.Module()
        for name, array in arrays.items():
            made.register_buffer(name, array)
        return made

    zeros = [
        torch.zeros(6),
        torch.zeros(2, 3),
        torch.zeros(3, 2),
        torch.zeros(6, dtype=torch.int32),
        torch.zeros(3, 2, 1),
    ]
    assert len({digest_of(model(a=array)) for array in zeros}) == 5
    assert digest_of(model(a=zeros[0], b=zeros[1])) == digest_of(model(b=zeros[1], a=zeros[0]))
    assert digest_of(model(a=torch.ones(2, 3).T)) == digest_of(model(a=torch.ones(3, 2)))


class PreTrainedModel(nn.Module):
    """Stands for that of transformers, which takes seconds to import."""


class TinyForCausalLM(PreTrainedModel):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 9)

    def forward(self, input_ids, labels):
        logits = self.table(input_ids)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"logits": logits, "loss": loss}


def gpt2():
    transformers = pytest.importorskip("transformers", reason="the model is of transformers")
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=9, **sizes))


@pytest.mark.parametrize("build", [TinyForCausalLM, pytest.param(gpt2, marks=pytest.mark.matrix)])
def test_causal_language_models_are_counted_as_they_count_their_loss(build):
    torch.manual_seed(0)
    model = build()
    tokens = torch.randint(0, 9, (4, 7), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "labels": tokens}
    predictor = Predictor(model, loss_fn=lambda output, batch: output["loss"])
    answer = checked_answer(predictor.answer(batch, VALIDATE), VALIDATE)
    with torch.no_grad():
        output = model.eval()(**batch)
    assert answer["loss"].tolist() == [float(output["loss"]), 1.0]
    told, truth = output["logits"][:, :-1].argmax(-1), tokens[:, 1:]
    right = answer["counts"][answer["pairs"] // 9 == answer["pairs"] % 9].sum()
    assert int(answer["counts"].sum()) == 24 and right == int((told == truth).sum())
