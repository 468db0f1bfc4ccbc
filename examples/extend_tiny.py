"""The embedded model to eight times its length: search, compare, export, verify.

Minutes on two CPU cores. At 16 evaluations a search has only begun, and may end with the best method that needs none;
the command's own default here is about 70.

python examples/extend_tiny.py [--out runs/extend-tiny] [--evaluations 16]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import longrope


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/extend-tiny"))
    parser.add_argument("--evaluations", type=int, default=16)
    args = parser.parse_args()

    # What is wrong with the checkpoint, before anything is paid for
    for finding in longrope.doctor("tiny"):
        print(f"{finding.severity}: {finding.what}; {finding.do}")

    # Factors for 2,048 tokens, searched on one share of Python's library and measured on another
    table = longrope.search(
        "tiny",
        to="2k",
        documents=["stdlib"],
        unseen=["stdlib"],
        evaluations=args.evaluations,
        out=args.out / "search",
    )
    print(f"rows up to {table.lengths}, attention factor {table.rows[-1].attention_factor:.4f}")

    # Beside the methods that need no search, on the same windows
    compared = longrope.compare(
        "tiny",
        lengths=[256, "2k"],
        methods=["none", "pi", "yarn", "llama3+su"],
        factors={"searched": table},
        documents=["stdlib"],
        windows=4,
        out=args.out / "compare",
    )
    for result in compared["results"]:
        print(f"{result['method']:>10} at {result['length']:>4}: {result['value']:.3f}")

    # A folder that stock transformers loads, read back and compared with what it was made of
    folder = longrope.export("tiny", table, args.out / "exported", engine="transformers", window="long")
    for said in longrope.verify(folder, against="tiny"):
        print(f"{said.name}: {said.what}")
        if said.ok is False:
            raise SystemExit(f"{folder} is not what it should be")


if __name__ == "__main__":
    main()
