#!/usr/bin/env bash
# ByteLevel.alphabet() of tokenizers lists its 256 characters in another order in each process.
#
# It is thought to be GPT-2's table of bytes, byte 0 first: who numbers a vocabulary by it, or takes the
# first so many, has other ids and other characters each time, and every text still goes in and comes
# out as it was. A tokenizer that is trained with it as initial_alphabet has the same ids each time: the
# trainer sorts it.
#
# tokenizers 0.23.3, Python 3.12. Seen:
#   orders in 4 processes: 4
#   sets of characters: 1
#   vocabularies that were trained with them: 1
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --no-cache-dir tokenizers==0.23.3

different() { # how many different lines a program prints in 4 processes
    for _ in 1 2 3 4; do
        "$folder/venv/bin/python" -c "
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
alphabet = pre_tokenizers.ByteLevel.alphabet()
def trained():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(['to be or not to be'] * 5, trainer)
    return sorted(tokenizer.get_vocab().items())
print($1)"
    done | sort -u | wc -l
}

failed=0
expect() {
    echo "$1: $2"
    [ "$2" = "$3" ] || { echo "  changed: was $3"; failed=1; }
}
expect "orders in 4 processes" "$(different 'alphabet')" 4
expect "sets of characters" "$(different 'sorted(alphabet)')" 1
expect "vocabularies that were trained with them" "$(different 'trained()')" 1
exit $failed
