"""The [task] tables of the tasks that tell images apart, and the keys of the network that three of them share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ddp.job.fields import Fraction, NonNegative, NonNegativeFloat, PathText, Positive, Section

Activation = Literal["relu", "leaky_relu", "elu", "gelu", "silu", "tanh", "sigmoid"]
Pixels = Annotated[int, Field(gt=0, le=4096)]


class ConvolutionalSection(Section):
    """A small convolutional network: `layers` convolutions, then `units` fully connected ones if any, then the classes."""

    name: str  # here, so that it stands first in what is printed
    channels: Positive = Field(default=32, description="of the first convolution; twice as many after each halving")
    layers: Annotated[int, Field(ge=1, le=64)] = Field(
        default=2, description="convolutions; each halves the resolution while there is one to halve"
    )
    units: NonNegative = Field(default=0, description="of a fully connected layer before the output; 0: there is none")
    activation: Activation = "relu"
    batch_norm: bool = True
    dropout: Fraction = Field(default=0.0, description="of what the output layer sees")
    label_smoothing: Fraction = Field(default=0.0, description="in training only; evaluation goes without")


class DigitsSection(ConvolutionalSection):
    """scikit-learn's bundled handwritten digits: 1,472 training and 325 validation images, 8x8."""

    name: Literal["digits"]  # pyright: ignore[reportIncompatibleVariableOverride]  frozen: nothing else is ever assigned


class ImagesSection(ConvolutionalSection):
    """Images in a folder of the user's: IDX files as MNIST and EMNIST have them, or pictures in a folder for each class."""

    name: Literal["images"]  # pyright: ignore[reportIncompatibleVariableOverride]  frozen: nothing else is ever assigned
    path: PathText = Field(description="folder of IDX files, or with train/CLASS/PICTURE or CLASS/PICTURE below it")
    prefix: str | None = Field(
        default=None, description='IDX: which files, where the folder holds several sets, for example "emnist-letters"'
    )
    transposed: Literal["auto", True, False] = Field(
        default="auto", description="IDX: rows and columns are swapped; auto: in files named emnist-..., which are so"
    )
    size: Pixels = Field(default=64, description="pictures: each is scaled and cut to size x size pixels")
    colour: bool = Field(default=True, description="pictures: three channels; false: one, of greys")
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1, description="of the training images, where the folder brings no validation set"
    )
    augment: bool = Field(default=False, description="turn and shift each training image at random, anew in each step")
    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = Field(
        default=10.0, description="augment: at most, both ways"
    )
    shift: Fraction = Field(default=0.1, description="augment: at most, of the height and of the width, both ways")


class SyntheticImagesSection(Section):
    """A residual network on images that are made, not read: for throughput at the size of real photographs."""

    name: Literal["synthetic_images"]
    size: Annotated[int, Field(ge=8, le=4096)] = Field(default=224, description="height and width in pixels")
    classes: Annotated[int, Field(ge=2, le=1_000_000)] = 1000
    depth: Literal[18, 34, 50, 101, 152] = Field(
        default=18, description="layers with weights, as in the paper's table 1"
    )
    width: Positive = Field(default=64, description="channels of the first stage; 64 in the paper")
    examples: Positive = 10_240
    validation_examples: Positive = 256
    noise: NonNegativeFloat = Field(default=1.0, description="standard deviation, around patterns of -1 and 1")
    dropout: Fraction = 0.0
    label_smoothing: Fraction = Field(default=0.0, description="in training only; evaluation goes without")
