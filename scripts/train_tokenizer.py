"""Make the simulated model's tokenizer again: byte-level BPE over the modules of Python's own standard library.

    python scripts/train_tokenizer.py OUT.json

The shipped one was made with CPython 3.11.7; another version has other modules, and gives other merges.
"""

import pathlib
import sys
import sysconfig

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
ENTRIES = 8000
MODULES = 200


def main() -> None:
    """Train and save."""
    modules = sorted(str(path) for path in pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))[:MODULES]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train(modules, trainers.BpeTrainer(vocab_size=ENTRIES, special_tokens=SPECIAL, initial_alphabet=alphabet))
    made.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 0)]
    )
    made.save(sys.argv[1])


if __name__ == "__main__":
    main()
