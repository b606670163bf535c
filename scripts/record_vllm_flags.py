"""Print the flags of `vllm serve` as vLLM's own parser names them; run it with a Python that has vLLM.

The charts' tests compare what they render with tests/charts/data/vllm_serve_flags.txt, which this wrote.
"""

import vllm
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = make_arg_parser(FlexibleArgumentParser())
print(f"# Flags of vllm serve {vllm.__version__}, as its own parser names them.")
for flag in sorted({flag for action in parser._actions for flag in action.option_strings}):
    print(flag)
