"""Compare the arms of a finished run by their harm: python -m examples.compare_arms runs/tiny

Harm is, of the questions that are answered right without the context, the share that is answered wrong with it. Read it
together with obedience: a model that ignores every prompt has no harm.
"""

import json
from pathlib import Path
import sys


def percent(metrics: dict, name: str) -> str:
    """The rate with its 95 % interval, or "-" if the run did not measure it."""
    if metrics.get(name) is None:
        return "-"
    low, high = metrics[f"{name}_ci"]
    return f"{100 * metrics[name]:5.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


if len(sys.argv) != 2:
    sys.exit(__doc__)
results = json.loads(Path(sys.argv[1], "results.json").read_text())
print(f"{'arm':16}{'harm':24}{'obedience':24}")
for arm, metrics in results.items():
    print(f"{arm:16}{percent(metrics, 'harm'):24}{percent(metrics, 'obedience'):24}")
