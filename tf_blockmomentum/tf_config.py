"""What TF_CONFIG may be."""

import json
from typing import Any


def check_tf_config(text: str | None) -> dict[str, Any]:
    """Returns `TF_CONFIG` as a dict. Raises ValueError, with the remedy, for one that TensorFlow
    would trip over."""
    if not text:
        return {}
    example = (
        '{"cluster": {"worker": ["host1:port", "host2:port"]}, '
        '"task": {"type": "worker", "index": 0}}'
    )

    def bad(problem: str) -> ValueError:
        return ValueError(
            f"TF_CONFIG is not usable: {problem}. Received: TF_CONFIG={text!r}. "
            f"Expected something like {example}. "
            f"`python -m tf_blockmomentum.launch` sets it for every worker."
        )

    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise bad(f"it is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise bad("it is not a JSON object")
    if not config:
        return {}
    cluster, task = config.get("cluster"), config.get("task")
    if not isinstance(cluster, dict) or not cluster:
        raise bad("it has no `cluster`")
    for kind, addresses in cluster.items():
        if kind not in ("chief", "worker", "evaluator"):
            raise bad(f"block training knows the tasks chief and worker, not {kind!r}")
        if not isinstance(addresses, list) or not all(
            isinstance(address, str) and address.rpartition(":")[2].isdigit()
            for address in addresses
        ):
            raise bad(f'`cluster[{kind!r}]` is not a list of "host:port"')
        if len(set(addresses)) != len(addresses):
            raise bad(f"`cluster[{kind!r}]` names an address twice")
    if not isinstance(task, dict) or task.get("type") not in cluster:
        raise bad(f"`task.type` is none of {sorted(cluster)}")
    index = task.get("index")
    if not isinstance(index, int) or not 0 <= index < len(cluster[task["type"]]):
        count = len(cluster[task["type"]])
        raise bad(f"`task.index` is not a whole number from 0 to {count - 1}")
    return config
