"""Elastic averaging SGD in its synchronous form, on BlockLoop, to compare with.

Not a part of the package: replicas never go back to what they share, so there is no anchor in
`BlockMomentum`'s sense, and what is saved in mid-training is the centre only.
"""

import tensorflow as tf

import tf_blockmomentum as tfbm
from tf_blockmomentum.boundary.exchange import means


class ElasticAveraging(tfbm.BlockMomentum):
    r"""EASGD; EAMSGD when the inner optimizer is SGD with Nesterov momentum.

    Every K steps, with $\tilde x$ the centre (the anchor) and $\alpha = \beta / P$:

    $$w_j \leftarrow w_j - \alpha (w_j - \tilde x), \qquad
    \tilde x \leftarrow \tilde x + \beta\, (\bar w - \tilde x)$$

    Args:
        inner_optimizer: what each replica trains with.
        sync_period: K (the paper's tau).
        elasticity: beta, in (0, 1]; the paper's 0.9.

    Source: Zhang, Choromanska and LeCun, "Deep learning with Elastic Averaging SGD"
    (arXiv 1412.6651), equations 5 and 6 with communication period tau.
    """

    def __init__(self, inner_optimizer, sync_period, elasticity=0.9):
        super().__init__(inner_optimizer, sync_period, block_momentum=0)
        self.elasticity = elasticity

    def take_outer_step(self, sums, active):
        """Both sides of the elastic move."""
        alpha = self.elasticity / tf.distribute.get_strategy().num_replicas_in_sync
        pairs = zip(self.trained_variables, self.anchors, strict=True)
        deltas, d = self.deltas(), means(sums, active)
        for (w, centre), delta, mean in zip(pairs, deltas, d, strict=True):
            w.assign_sub(alpha * delta)
            centre.assign_add(self.elasticity * mean)
