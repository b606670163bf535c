"""`python -m pdsim.timing [PROFILE]`: each measured figure beside the model's; exit 1 if one is off by over 10 %."""

import sys

from pdsim.timing.model import load_profile
from pdsim.timing.replay import measured, points

TOLERANCE = 0.10


def main() -> int:
    """Print the table."""
    name = sys.argv[1] if len(sys.argv) > 1 else "h200"
    try:
        profile = load_profile(name)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    source = measured(name)["provenance"]
    if "derived" in source:
        print(f"{name}: {source['hardware']}; {source['derived']}")
        return 0
    print(f"{name}: {source['hardware']}; vLLM {source['vllm']}; NIXL {source['nixl']}; {source['date']}")
    print(f"{'point':<20} {'measured':>18} {'model':>10} {'unit':<6} {'error':>7}")
    off = 0
    for point in points(profile):
        runs = " / ".join(f"{run:g}" for run in point.measured)
        wrong = abs(point.error) > TOLERANCE
        off += wrong
        print(f"{point.name:<20} {runs:>18} {point.model:>10.2f} {point.unit:<6} {point.error:>+7.1%}{' !' * wrong}")
    print(f"{off} of {sum(1 for _ in points(profile))} points off by more than {TOLERANCE:.0%}")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
