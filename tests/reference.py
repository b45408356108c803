"""An independent M-AVG in NumPy, written from the paper's loops."""

import functools

import numpy as np


def softmax_gradients(weights, x, y):
    """Mean cross-entropy of a linear softmax classifier, and its gradients."""
    kernel, bias = weights
    logits = x @ kernel + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    loss = -np.log(p[np.arange(len(y)), y]).mean()
    p[np.arange(len(y)), y] -= 1
    p /= len(y)
    return loss, [x.T @ p, p.sum(0)]


class Float16:
    """Deltas sent as float16 with error feedback, and added up as float16."""

    def __init__(self):
        self.residuals = {}

    def __call__(self, deltas, which=0):
        """What the replicas send of tensor number `which`, and its mean."""
        wanted = deltas + self.residuals.get(which, 0)
        codes = wanted.astype(np.float16)
        self.residuals[which] = wanted - codes
        return codes.astype(np.float64), codes.sum(0, dtype=np.float16) / np.float64(len(codes))


def uncompressed(deltas, which=0):
    """As `Float16`, of deltas that travel as they are."""
    return deltas, deltas.mean(0)


def shaped_as(weights, flat):
    """A flat array cut into arrays of the shapes of `weights`."""
    parts = np.split(flat, np.cumsum([np.size(w) for w in weights])[:-1])
    return [p.reshape(np.shape(w)) for p, w in zip(parts, weights, strict=True)]


def m_avg(
    weights,
    batches,
    gradients,
    learning_rate,
    sync_period,
    block_momentum,
    block_learning_rate=1.0,
    nesterov=False,
    inner_momentum=0.0,
    epoch_steps=None,
    send=uncompressed,
):
    """Runs M-AVG over `batches[step][replica] = (x, y)` in float64.

    Returns the weights at every boundary, and the replicas' weights just before each. A
    block also ends where an epoch of `epoch_steps` does.
    """
    replicas = len(batches[0])
    anchor = [np.asarray(w, np.float64) for w in weights]
    velocity = [np.zeros_like(w) for w in anchor]
    local = [[w.copy() for w in anchor] for _ in range(replicas)]
    inner = [[np.zeros_like(w) for w in anchor] for _ in range(replicas)]
    boundaries, before = [], []
    position = 0
    for step, shares in enumerate(batches):
        for j, (x, y) in enumerate(shares):
            _, grads = gradients(local[j], x, y)
            for i, g in enumerate(grads):
                inner[j][i] = inner_momentum * inner[j][i] - learning_rate * g
                local[j][i] = local[j][i] + inner[j][i]
        position += 1
        last = step + 1 == len(batches) or (epoch_steps and (step + 1) % epoch_steps == 0)
        if position == sync_period or last:
            before.append([[w.copy() for w in replica] for replica in local])
            for i in range(len(anchor)):
                _, delta = send(np.stack([local[j][i] for j in range(replicas)]) - anchor[i], i)
                velocity[i] = block_momentum * velocity[i] + block_learning_rate * delta
                step_by = velocity[i]
                if nesterov:
                    step_by = block_momentum * velocity[i] + block_learning_rate * delta
                anchor[i] = anchor[i] + step_by
            local = [[w.copy() for w in anchor] for _ in range(replicas)]
            boundaries.append([w.copy() for w in anchor])
            position = 0
    return boundaries, before


def overlapped_m_avg(
    weights,
    batches,
    gradients,
    learning_rate,
    sync_period,
    block_momentum,
    block_learning_rate=1.0,
    nesterov=False,
    epoch_steps=None,
    send=uncompressed,
):
    """M-AVG whose outer step comes one block late, in float64, over `batches` as in `m_avg`.

    Returns every replica's weights after each block; where an epoch ends all have landed.
    """
    beta, zeta = block_momentum, block_learning_rate
    anchor = np.concatenate([np.ravel(w) for w in weights]).astype(np.float64)
    velocity = np.zeros_like(anchor)
    lists = functools.partial(shaped_as, weights)

    def outer_step(anchor, velocity, delta):
        velocity = beta * velocity + zeta * delta
        return anchor + (beta * velocity + zeta * delta if nesterov else velocity), velocity

    begin = np.stack([anchor] * len(batches[0]))
    local, in_flight, seen, position = begin.copy(), None, [], 0
    for step, shares in enumerate(batches):
        for j, (x, y) in enumerate(shares):
            _, grads = gradients(lists(local[j]), x, y)
            local[j] -= learning_rate * np.concatenate([np.ravel(g) for g in grads])
        position += 1
        last = step + 1 == len(batches) or (epoch_steps and (step + 1) % epoch_steps == 0)
        if position < sync_period and not last:
            continue
        (deltas, mean), position = send(local - begin), 0
        if in_flight is not None:
            anchor, velocity = outer_step(anchor, velocity, in_flight)
        in_flight = mean
        begin = np.stack([outer_step(anchor, velocity, delta)[0] for delta in deltas])
        if last:
            anchor, velocity = outer_step(anchor, velocity, in_flight)
            in_flight, begin = None, np.stack([anchor] * len(deltas))
        local = begin.copy()
        seen.append([lists(w) for w in begin])
    return seen


def block_momentum(beta, zeta=1.0, nesterov=False):
    """The outer step of M-AVG: of (anchor, delta, velocity), the next anchor and velocity."""

    def outer(anchor, delta, velocity):
        velocity = beta * velocity + zeta * delta
        return anchor + (beta * velocity + zeta * delta if nesterov else velocity), velocity

    return outer


class Constant:
    """K as a schedule."""

    initial = 1

    def __init__(self, period):
        self.period = period

    def __call__(self, step, adapted):
        return self.period


def overlapped(
    weights,
    batches,
    gradients,
    learning_rate,
    schedule,
    tau_of,
    outer,
    foreseen=True,
    epoch_steps=None,
    synchronous_until=0,
):
    """Blocks whose mean lands within the next one, in float64, over `batches` as in `m_avg`.

    Args:
        schedule: K of the block that begins at a step, with what `adapt` said last of a block
            that has landed.
        tau_of: function of K: after how many steps of such a block the one before lands.
        outer: function of (anchor, delta, state), which returns the next of both.
        foreseen: whether a replica begins where that would lead with its own delta.
        synchronous_until: blocks that begin before this step land at once, and the anchor
            becomes the mean.

    Returns every replica's weights after each step, each landed block's length, and the anchors
    where they landed.
    """
    anchor = np.concatenate([np.ravel(w) for w in weights]).astype(np.float64)
    state, adapted = 0.0, schedule.initial
    lists = functools.partial(shaped_as, weights)

    def land(flight):
        nonlocal anchor, state, adapted
        deltas, begun, period, length = flight
        apart = np.mean([((d - deltas.mean(0)) ** 2).sum() for d in deltas])
        drift = np.sqrt(apart / (anchor**2).sum())
        if begun < synchronous_until:
            anchor = anchor + deltas.mean(0)
        else:
            anchor, state = outer(anchor, deltas.mean(0), state)
        if getattr(schedule, "measures_drift", False):
            new = schedule.adapt(begun, period, drift)
            adapted = new if length == period else min(new, adapted)
        lengths.append(length)
        anchors.append(lists(anchor))

    local = np.stack([anchor] * len(batches[0]))
    start, flight, position, period = local.copy(), None, 0, schedule(0, adapted)
    seen, lengths, anchors = [], [], []
    for step, shares in enumerate(batches):
        for j, (x, y) in enumerate(shares):
            _, grads = gradients(lists(local[j]), x, y)
            local[j] -= learning_rate * np.concatenate([np.ravel(g) for g in grads])
        position += 1
        last = step + 1 == len(batches) or (epoch_steps and (step + 1) % epoch_steps == 0)
        block_ends = position == period or last
        if flight is not None and (position == tau_of(period) or block_ends):
            land(flight)
            local, start, flight = anchor + (local - start), np.stack([anchor] * len(local)), None
        if block_ends:
            begun = step + 1 - position
            flight = (local - start, begun, period, position)
            start = np.stack(
                [outer(anchor, d, state)[0] if foreseen else anchor + d for d in flight[0]]
            )
            if last or begun < synchronous_until:
                land(flight)
                flight, start = None, np.stack([anchor] * len(local))
            local, position, period = start.copy(), 0, schedule(step + 1, adapted)
        seen.append([lists(w.copy()) for w in local])
    return seen, lengths, anchors


def local_training(weights, batches, gradients, inner, outer, period, end=lambda states: states):
    """Any method of the family, from its own recursion, in float64.

    Args:
        weights: list of arrays.
        batches: `batches[step][replica] = (x, y)`.
        gradients: function of weights, x, y that returns loss and gradients.
        inner: function of (weights, gradients, state, step), which returns new weights and
            state; the state is None at first.
        outer: function of (anchor, delta, state, step), likewise, for one boundary.
        period: K of the block that begins at a step, and with the drift of a whole one before it.
        end: what becomes of the replicas' inner states at a boundary.

    Returns the weights at every boundary, each block's length, and that of the next.
    """
    anchor = [np.asarray(w, np.float64) for w in weights]
    local = [[w.copy() for w in anchor] for _ in batches[0]]
    states, outer_state = [None] * len(local), None
    boundaries, lengths, position, drift = [], [], 0, None
    length = period(0, drift)
    for step, shares in enumerate(batches):
        for j, (x, y) in enumerate(shares):
            _, grads = gradients(local[j], x, y)
            local[j], states[j] = inner(local[j], grads, states[j], step)
        position += 1
        if position == length or step + 1 == len(batches):
            mean = [np.mean(parts, axis=0) for parts in zip(*local, strict=True)]
            apart = [
                sum(((a - b) ** 2).sum() for a, b in zip(w, mean, strict=True)) for w in local
            ]
            drift = np.sqrt(np.mean(apart) / sum((w**2).sum() for w in anchor))
            delta = [m - a for m, a in zip(mean, anchor, strict=True)]
            anchor, outer_state = outer(anchor, delta, outer_state, step)
            local = [[w.copy() for w in anchor] for _ in local]
            states = end(states)
            boundaries.append([w.copy() for w in anchor])
            lengths.append(position)
            position, length = 0, period(step + 1, drift if position == length else None)
    return boundaries, lengths, length


# -- codes of 8 and 4 bits ------------------------------------------------------------------------


def coded(x, bits):
    """Float32 values of shape [blocks, 256] as codes say them, and the blocks' scales."""
    most = 2 ** (bits - 1) - 1
    largest = np.abs(x).max(1)
    # The upper half of a float32, rounded up.
    scale = (largest * np.float32(1 / most)).astype(np.float32)
    scale = ((scale.view(np.uint32).astype(np.int64) + 0xFFFF) & 0xFFFF0000).astype(np.uint32)
    scale = np.where(largest < 2.0**-100, np.float32(0), scale.view(np.float32))
    one = np.where(scale > 0, scale, np.float32(1))
    codes = np.rint(x * np.where(scale > 0, 1 / one, np.float32(0))[:, None])
    assert np.abs(codes).max() <= most
    return codes.astype(np.float32) * scale[:, None], scale


class Coded:
    """Flat deltas sent as codes, with error feedback at the senders and at the owners. Who owns
    which blocks makes no difference to the numbers."""

    def __init__(self, bits, replicas, size):
        self.bits, self.size = bits, size
        self.blocks = -(-size // 256)
        self.residuals = np.zeros([replicas, self.blocks, 256], np.float32)
        self.kept = np.zeros([self.blocks, 256], np.float32)

    def __call__(self, deltas):
        """What the replicas' codes say, and the sum's."""
        padded = np.zeros([len(deltas), self.blocks * 256], np.float32)
        padded[:, : self.size] = deltas
        wanted = padded.reshape(self.residuals.shape) + self.residuals
        sent = np.stack([coded(x, self.bits)[0] for x in wanted])
        self.residuals = wanted - sent
        total = self.kept
        for x in sent:
            total = total + x
        told, _ = coded(total, self.bits)
        self.kept = total - told
        return sent.reshape(len(deltas), -1)[:, : self.size], told.ravel()[: self.size]


def coded_m_avg(slopes, sync_period, block_momentum, bits, landing):
    """M-AVG from zeros in float32, each rounding where the library has it: inner SGD of rate 1 on
    losses of constant slopes of shape [steps, replicas, size], deltas as codes.

    `landing`: after how many steps of the next block a mean lands; 0: without overlap.

    Returns every replica's weights after each block, all landed at the end.
    """
    replicas, size = slopes.shape[1:]
    beta, share = np.float32(block_momentum), np.float32(1 / replicas)
    send = Coded(bits, replicas, size)
    anchor, velocity = np.zeros(size, np.float32), np.zeros(size, np.float32)
    begin = np.zeros([replicas, size], np.float32)
    local, in_flight, seen = begin.copy(), None, []

    def land(total):
        nonlocal anchor, velocity
        velocity = velocity * beta + total * share
        anchor = anchor + velocity

    for step, slope in enumerate(slopes):
        local = local - slope
        position = step % sync_period + 1
        if in_flight is not None and position == landing < sync_period:
            moved = local - begin
            land(in_flight)
            in_flight, begin = None, np.stack([anchor] * replicas)
            local = anchor + moved
        if position < sync_period:
            continue
        sent, total = send(local - begin)
        if in_flight is not None:
            land(in_flight)
        in_flight, begin = total, anchor + (beta * velocity + sent)
        if not landing or step + 1 == len(slopes):
            land(in_flight)
            in_flight, begin = None, np.stack([anchor] * replicas)
        local = begin.copy()
        seen.append(local.copy())
    return seen
