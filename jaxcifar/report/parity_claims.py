"""What the reports conclude in words, and the measured rows that show whether it is so here."""

import dataclasses

from jaxcifar.report import parity_rows

METRICS = ("train_accuracy", "val_accuracy")


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence of a report, and the (row's name, label) that it compares."""

    report: str
    text: str
    rows: tuple


CLAIMS = (
    Claim("architectures", "CNN: in batches of 64 a learning rate of 0.01 hardly trains, and differs "
          "most from seed to seed", parity_rows.cnn_cells(
              ((b, rate, 0, 0, "none"), f"batch {b}, rate {rate}")
              for b in (64, 128) for rate in (0.01, 0.001, 0.0001))),
    Claim("architectures", "CNN: any L2 hurts much", parity_rows.cnn_cells(
        ((128, 0.001, l2, d, augmentation), f"dropout {d}, augmentation {augmentation}, L2 {l2}")
        for augmentation in ("none", "basic") for d in (0, 0.5) for l2 in (0, 0.01))),
    Claim("architectures", "CNN: dropout reduces overfitting", parity_rows.cnn_cells(
        ((128, 0.001, 0, d, augmentation), f"augmentation {augmentation}, dropout {d}")
        for augmentation in ("none", "basic") for d in (0, 0.5))),
)


def compared(report, results):
    """Return [(Claim, [(label, {metric: values of the seeds})])] of a report's measured rows.

    results: see parity_results.read. A claim of which fewer than two rows are measured is left out.
    The accuracies, of `METRICS`, are those of each run's last epoch.
    """
    found = []
    for claim in CLAIMS:
        lines = [(label, {metric: [record["curves"][metric][-1]
                                   for record in results[row]["seeds"].values()]
                          for metric in METRICS})
                 for row, label in claim.rows if row in results]
        if claim.report == report and len(lines) > 1:
            found.append((claim, lines))
    return found
