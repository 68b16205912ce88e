"""Compare our numbers with the published ones: run rows, keep their results, write docs/parity.md.

python scripts/parity.py --rows='architectures/*' --seeds=0,1,2 --budget-minutes=60
python scripts/parity.py --list --rows='*'       # every row: seeds measured, cost, minutes expected
python scripts/parity.py --collect=FOLDER        # take the finished runs beneath FOLDER
python scripts/parity.py --report-only           # docs/parity.md and its figures from results/
"""

import pathlib
import sys

from jaxcifar import command


def main():
    """Parse the flags, make one call, return the exit code."""
    add = (parser := command.Parser(__doc__)).add_argument
    add("--rows", default="published", help="globs of REPORT/VARIANT, with commas")
    add("--seeds", default="0,1,2")
    add("--budget-minutes", "--budget_minutes", type=command.at_least(0, float), default=0,
        metavar="MINUTES", help="then save and stop; 0: no")
    add("--jobs", default="auto", help="runs side by side, or auto")
    add("--workdir", default="runs/parity", help="of the run folders")
    add("--list", action="store_true", help="print the rows by cost, and exit")
    add("--collect", metavar="FOLDER", help="merge the finished runs beneath it")
    add("--report-only", "--report_only", action="store_true", help="write the page only")
    f, root = parser.parse_args(), pathlib.Path(__file__).resolve().parent.parent
    from jaxcifar.report import parity  # here, so that Ctrl-C is caught meanwhile
    if f.list or f.collect or f.report_only:
        return (parity.list_rows(root, rows=f.rows) if f.list else
                parity.collect(root, f.collect) if f.collect else parity.report(root))
    return parity.run_rows(root, rows=f.rows, seeds=f.seeds, budget_minutes=f.budget_minutes,
                           jobs=f.jobs, workdir=f.workdir, stop=parity.stop_on_signal())


if __name__ == "__main__":
    sys.exit(command.run(main, "the same command goes on"))
