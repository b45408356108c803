"""What others have published on how large block momentum should be."""

import math

# The slow momentum that SlowMo's authors tuned, by number of workers (Wang et al., "SlowMo:
# Improving Communication-Efficient Distributed SGD with Slow Momentum", ICLR 2020, appendix).
SLOWMO = {4: 0.2, 8: 0.5, 16: 0.6}


def published_rules(replicas: int) -> dict[str, float]:
    """The published choices of beta for a number of replicas, by the name of their source.

    BMUF: 1 - 1/P (Chen and Huo, "Scalable training of deep learning machines by
    incremental block training with intra-block parallel optimization and blockwise
    model-update filtering", ICASSP 2016). SlowMo: a tuned table for 4, 8 and 16 workers;
    between and beyond them the value of the nearest.
    """
    nearest = min(SLOWMO, key=lambda p: abs(math.log2(p / replicas)))
    slowmo = "SlowMo's table" + ("" if nearest == replicas else f" (for P={nearest})")
    return {"BMUF, 1 - 1/P": 1 - 1 / replicas, slowmo: SLOWMO[nearest]}
