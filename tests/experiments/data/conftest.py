"""Small data sets for the tests of this folder."""

import pytest
from PIL import Image


@pytest.fixture
def folder_of_images(tmp_path):
    """Images of two classes in the splits `train` and `validation`."""
    for split, count in (("train", 3), ("validation", 2)):
        for name, shade in (("cat", 50), ("dog", 200)):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("L", (20, 24), shade + number).save(folder / f"{number}.png")
    return tmp_path / "images"
