"""A proof for a test suite: do these plans compute for this model what one process computes?"""

from digits import Digits, digit_loss, mlp

from trainfleet import LocalBatches, Plan, verify

PLANS = [Plan(tp=2), Plan(zero=2, dp_shard=2, pp=2, microbatches=2)]


def test_every_plan_computes_the_same() -> None:
    stream = LocalBatches(Digits(), size=8)
    batches = [next(stream) for _ in range(4)]
    for plan in PLANS:
        verdict = verify(mlp(), plan, batches, loss_fn=digit_loss)
        assert verdict.holds, verdict
        print(f"{plan}\n    {verdict}")


if __name__ == "__main__":
    test_every_plan_computes_the_same()
