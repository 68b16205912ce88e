"""Write docs/models.md, the page of models:  python scripts/models_page.py"""

import pathlib

from jaxcifar.report import models_page


def main():
    """Write the page."""
    path = pathlib.Path(__file__).resolve().parent.parent / "docs" / "models.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(models_page.page(), encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
