"""Makes the embedded emoji set from two npm packages. Nobody has to run this: its two files are in the repository.

    npm pack emoji-datasource-google@16.0.0 emojibase-data@17.0.0
    for f in *.tgz; do mkdir -p "${f%.tgz}" && tar xzf "$f" -C "${f%.tgz}"; done
    python mmx/data/emoji/make.py FOLDER_OF_THE_TWO_UNPACKED_PACKAGES

Writes `sprite.png`, 32 x 32 pictures in row-major order on white, 62 in a row, 256 colours, and `emoji.json`: for each
picture, column by column, its code points, those of its base emoji, its name, group, and skin tones.
Pictures: Noto Emoji, Apache-2.0. Names, groups, tones: emojibase, MIT. See LICENSES.md beside this file.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
SIZE, COLUMNS, COLOURS = 32, 62, 256


def normal(code: str) -> str:
    """Code points in lower case without the variation selector, which the two packages treat differently."""
    return code.lower().replace("-fe0f", "")


def read_names(package: Path) -> dict[str, dict]:
    """Name, group, tones and base of every emoji, by its code points."""
    groups = json.loads((package / "meta/groups.json").read_text())["groups"]
    found = {}
    for base in json.loads((package / "en/data.json").read_text()):
        for entry in (base, *base.get("skins", ())):
            tones = entry.get("tone", [])
            found[normal(entry["hexcode"])] = {
                "name": entry["label"],
                "group": groups.get(str(base.get("group")), "none"),
                "tones": tones if isinstance(tones, list) else [tones],
                "base": normal(base["hexcode"]),
            }
    return found


def read_picture(path: Path) -> np.ndarray:
    """One picture on white: (32, 32, 3) uint8."""
    picture = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return np.asarray(white.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def main(folder: Path) -> None:
    """Makes both files from the folder of the two packages."""
    names = read_names(next(folder.glob("emojibase-data*")) / "package")
    files = sorted(next(folder.glob("emoji-datasource-google*")).glob("package/img/google/64/*.png"))
    files = [file for file in files if normal(file.stem) in names]
    rows = -(-len(files) // COLUMNS)
    sprite = np.full((rows * SIZE, COLUMNS * SIZE, 3), 255, np.uint8)
    for i, file in enumerate(files):
        top, left = i // COLUMNS * SIZE, i % COLUMNS * SIZE
        sprite[top : top + SIZE, left : left + SIZE] = read_picture(file)
    image = Image.fromarray(sprite).quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    image.save(HERE / "sprite.png", optimize=True)
    entries = [{"key": normal(file.stem), **names[normal(file.stem)]} for file in files]
    columns = {column: [entry[column] for entry in entries] for column in ("key", "base", "name", "group", "tones")}
    (HERE / "emoji.json").write_text(json.dumps(columns, separators=(",", ":"), ensure_ascii=False))
    print(f"{len(files)} emoji: sprite.png {(HERE / 'sprite.png').stat().st_size:,} bytes,", end=" ")
    print(f"emoji.json {(HERE / 'emoji.json').stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
