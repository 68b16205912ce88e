"""Write docs/models.md, the page of models:  python scripts/models_page.py"""

import pathlib

from jaxcifar.report import measured, models_page


def main():
    """Write the page."""
    root = pathlib.Path(__file__).resolve().parent.parent
    path = root / "docs" / "models.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        models_page.page(measured.accuracies(root), measured.training_speeds(root)), encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
