"""`stages.train` under torchrun, saving every step; its second rank waits once to be killed."""

import os
import time
from pathlib import Path
from typing import Any

from pipeline import resume, train
from stages import train as stage

resume.EVERY_S, resume.SHARE = 0.0, 0
rate = train.learning_rate
seen: list[int] = []


def waits(step: int, **course: Any) -> float:
    marker = Path("waits-to-be-killed")
    if not seen and marker.exists():
        Path("went-on").write_text(str(step))
    seen.append(step)
    if step == 3 and os.environ["RANK"] == "1" and not marker.exists():
        marker.write_text("")
        time.sleep(600)
    return rate(step, **course)


train.learning_rate = waits
if __name__ == "__main__":
    stage.main()
