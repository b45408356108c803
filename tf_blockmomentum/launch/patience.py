"""A worker that waits for others for long: for whom."""

import threading
import time
from collections.abc import Callable, Mapping

from tf_blockmomentum import progress
from tf_blockmomentum.launch import cluster

WAIT_SECONDS = 30.0
_AGAIN_SECONDS = 300.0


class Patience:
    """Watches how long workers wait, and says for whom.

    The launcher does this, since a worker that waits for others to start cannot: TensorFlow
    does not let go of Python's lock meanwhile.

    Args:
        local: address of each worker here, by index.
        remote: of those on other machines.
        say: function that takes a line.
    """

    def __init__(
        self, local: Mapping[int, str], remote: Mapping[int, str], say: Callable[[str], None]
    ) -> None:
        self._local, self._remote, self._say = dict(local), dict(remote), say
        self._since: dict[int, tuple[progress.Word, float]] = {}
        self._next = 0.0

    def look(self, words: Mapping[int, progress.Word]) -> None:
        """Takes what every worker here that still runs said last."""
        now = time.monotonic()
        for index, word in words.items():
            if index not in self._since or self._since[index][0] != word:
                self._since[index] = word, now
        waiting = [i for i, word in words.items() if word.text.startswith(progress.WAITS)]
        long = [i for i in waiting if now - self._since[i][1] > WAIT_SECONDS]
        if not long or now < self._next:
            return
        late = [
            f"worker {i} ({address}), "
            + (f"whose last word is: {words[i].text}" if i in words else "which has ended")
            for i, address in self._local.items()
            if i not in waiting
        ]
        who = f"{'workers' if len(long) > 1 else 'worker'} {', '.join(map(str, long))}"
        seconds = now - min(self._since[i][1] for i in long)
        said = f"{who} waited for {seconds:.0f} s"
        if late or self._remote:
            self._next = now + _AGAIN_SECONDS
            threading.Thread(target=self._tell, args=(said, late), daemon=True).start()
        elif seconds > _AGAIN_SECONDS:
            self._next = now + _AGAIN_SECONDS
            self._say(f"{said}, each for the others: {words[long[0]].text}")

    def _tell(self, said: str, late: list[str]) -> None:
        if not late:  # those here are not to blame
            import concurrent.futures  # a fifth of the launcher's own start, and rarely needed

            with concurrent.futures.ThreadPoolExecutor(32) as pool:
                there = list(pool.map(cluster.answers, self._remote.values()))
            all_there = all(there)
            late = [
                f"worker {i} ({address}), which {'is slow or stuck' if one else 'does not answer'}"
                for (i, address), one in zip(self._remote.items(), there, strict=True)
                if all_there or not one
            ]
        most = 8
        more = f" and {len(late) - most} more" if len(late) > most else ""
        self._say(f"{said} for " + "; ".join(late[:most]) + more)
