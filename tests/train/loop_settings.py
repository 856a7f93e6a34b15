"""Settings of the training loop for tests."""

from posttrain.train.schedule import (
    LoopSettings,
)


def settings(**changes: object) -> LoopSettings:
    plain = LoopSettings(
        epochs=1.0, batch=4, learning_rate=1.0, schedule="cosine", warmup=0.0, weight_decay=0.0, clip=1.0, keep="last",
        patience=0, validate_every=0, checkpoint_every=0, checkpoint_minutes=2.0, seed=0,
    )  # fmt: skip
    return plain._replace(**changes)
