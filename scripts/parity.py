"""Compare our numbers with the published ones: run rows, keep their results, write docs/parity.md.

python scripts/parity.py --rows='architectures/*' --seeds=0,1,2 --budget-minutes=60
python scripts/parity.py --list --rows='*'       # every row: seeds measured, cost, minutes expected
python scripts/parity.py --collect=FOLDER        # take the finished runs beneath FOLDER
python scripts/parity.py --report-only           # docs/parity.md and its figures from results/
"""

import argparse
import pathlib
import sys

from jaxcifar.errors import UserError
from jaxcifar.report import parity


def main():
    """Parse the flags, make one call, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="published", help="globs of REPORT/VARIANT, with commas")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--budget-minutes", type=float, default=0, help="then save and stop; 0: no")
    parser.add_argument("--jobs", default="auto", help="runs side by side, or auto")
    parser.add_argument("--workdir", default="runs/parity", help="of the run folders")
    parser.add_argument("--list", action="store_true", help="print the rows by cost, and exit")
    parser.add_argument("--collect", metavar="FOLDER", help="merge the finished runs beneath it")
    parser.add_argument("--report-only", action="store_true", help="write the page only")
    f, root = parser.parse_args(), pathlib.Path(__file__).resolve().parent.parent
    try:
        if f.list or f.collect or f.report_only:
            return (parity.list_rows(root, rows=f.rows) if f.list else
                    parity.collect(root, f.collect) if f.collect else parity.report(root))
        return parity.run_rows(root, rows=f.rows, seeds=f.seeds, budget_minutes=f.budget_minutes,
                               jobs=f.jobs, workdir=f.workdir, stop=parity.stop_on_signal())
    except UserError as error:
        return print(f"error: {error}", file=sys.stderr) or error.exit_code


if __name__ == "__main__":
    sys.exit(main())
