"""How a boundary grows with the workers, the weights and the variables: a part of speed.py."""

import gc
import itertools
import math
import statistics
import time

from speed import FORMS, NO_SYNC, PLAIN

GROWTH_FORMS = ("blocks", "blocks, overlap=0.5, int8")
RESNET50 = "resnet50"
# (workers, megabytes, variables): one grows at a time; and a model as people have them.
SIZES = (0.1, 4, 100, 400)
CASES = (
    *((workers, 19, 20) for workers in (2, 3, 4, 5, 8)),
    *((2, size, 20) for size in SIZES),
    *((2, 19, variables) for variables in (5, 100, 1000)),
)


def many(megabytes, variables):
    """A model of so many float32 variables of one size, whose step does little but pass over
    them, and a batch for it."""
    import keras
    import numpy as np
    from keras import ops

    class Many(keras.layers.Layer):
        def build(self, shape):
            rows = max(1, round(megabytes * 1e6 / 4 / variables / 64))
            self.parts = [
                self.add_weight(shape=[rows, 64], name=f"part_{i}") for i in range(variables)
            ]

        def call(self, x):
            return x * sum(ops.mean(part) for part in self.parts)

    model = keras.Sequential([keras.Input([1]), Many()])
    return model, np.ones([4, 1], "float32"), np.zeros([4, 1], "float32")


def work_growth(options):
    """Of each form, seconds of a boundary, and of the first step and the first boundary, which
    include tracing and compiling."""
    import keras
    import tensorflow as tf
    from speed_parts import all_reduce_seconds, batches, clock, network

    import tf_blockmomentum as tfbm

    strategy = tfbm.MultiWorkerBlockStrategy()
    first_worker = not strategy.cluster_resolver.task_id
    resnet, forms = options.model == RESNET50, options.forms
    each, executions = (2, 4) if resnet else (8, 12)
    for form in (PLAIN, *(form for form in forms if form in GROWTH_FORMS)):
        overlap, strategy.compression = FORMS.get(form, (False, None))
        plain = form == PLAIN
        with (tf.distribute.get_strategy() if plain else strategy).scope():
            if resnet:
                model, x, y = network(RESNET50)
                loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            else:
                model, x, y = many(options.size, options.variables)
                loss = "mse"
            optimizer = keras.optimizers.SGD(1e-3)
            if not plain:
                optimizer = tfbm.BlockMomentum(optimizer, sync_period=NO_SYNC, overlap=overlap)
            model.compile(optimizer, loss, steps_per_execution=each)
        timed = clock()
        callbacks = [timed] if plain else [tfbm.BlockTraining(options.jit), timed]
        data = batches(strategy, form, x, y)
        found = {}

        def fit(count, model=model, data=data, callbacks=callbacks, timed=timed):
            """Seconds of each execution, and of what came after the last."""
            began = time.perf_counter()
            model.fit(data, steps_per_epoch=count * each, verbose=0, callbacks=callbacks)
            ends = [began, *timed.ends]
            spans = [b - a for a, b in itertools.pairwise(ends)]
            return spans, time.perf_counter() - ends[-1]

        (found["first_seconds"], last), after = fit(2)
        step = statistics.median(fit(executions)[0][1:-1])
        settled = last - step + after  # the end of an epoch has a boundary
        if not plain:
            model.optimizer.sync_period = each
            spans, _ = fit(2)
            usual = statistics.median(fit(executions)[0][1:-1])
            found["first_boundary_seconds"] = settled + max(0.0, spans[0] - usual)
            found["boundary_seconds"] = usual - step
        size = sum(4 * math.prod(v.shape) for v in model.trainable_variables)
        shape = {"model_bytes": size, "variables": len(model.trainable_variables)}
        if first_worker:
            yield {"method": form, "steps": each, "step_seconds": step / each, **shape, **found}
        del model, optimizer, data, callbacks, fit
        keras.backend.clear_session()
        gc.collect()
    seconds = all_reduce_seconds(strategy, size // 4)
    if first_worker:
        yield {"method": "all_reduce alone", "boundary_seconds": seconds, **shape}
