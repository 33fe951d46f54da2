"""A person's own images: any size, in one folder or in nested ones."""

from pathlib import Path

from PIL import Image, ImageOps

from experiments.errors import DataError


def _endings() -> set[str]:
    Image.init()
    return {ending for ending, name in Image.EXTENSION.items() if name in Image.OPEN}


class OwnImages:
    """The images below a folder, in the order of their paths.

    Files and folders whose names begin with a dot, and files that Pillow knows no format for, are
    left out.

    Raises:
        DataError: the folder is missing or holds no image.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise DataError(f"--images: {folder} {what}; give a folder of images")
        endings = _endings()
        self.paths = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in endings
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
            and path.is_file()
        )
        if not self.paths:
            raise DataError(
                f"--images: {folder} holds no images; expected files such as NAME.jpg or NAME.png, "
                "in it or in folders of it"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Image.Image:
        """One image, upright and in RGB.

        Raises:
            DataError: it cannot be read.
        """
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
        except Exception as error:  # whatever a decoder raises: name the file
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"--images: cannot read {path}: {reason}; repair it or take it away"
            ) from None

    def label(self, index: int, num_classes: int, names: tuple[str, ...] | None) -> int | None:
        """The class whose name or number a folder of the image has, the nearest one, or None.

        Only folders inside the given one count. Case, spaces, hyphens and underscores do not.
        """
        for folder in reversed(self.paths[index].parent.relative_to(self.folder).parts):
            for number, name in enumerate(names or ()):
                if _plain(folder) == _plain(name):
                    return number
            if folder.isascii() and folder.isdigit() and int(folder) < num_classes:
                return int(folder)
        return None


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter not in " -_")
