"""Sizes, weights and numbers of the augmentation that every implementation shares: here, and in fastcifar.augmentation.

They are part of every published result: append, do not change. (Numba's cache would not notice a change here.)
"""

SIDE = 32  # pixels of a CIFAR image's side
Size = tuple[int, int]  # height and width of an image, pixels
CIFAR: Size = (SIDE, SIDE)
TOP = 255.0  # the brightest pixel value
LUMA = (2989, 5870, 1140)  # weights of R, G, B in a grey value, in ten-thousandths (ITU-R BT.601, as torchvision)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the columns of colour jitter's factors

# Operation numbers are positions here. RandAugment and TrivialAugment draw from the first 14; Invert is AutoAugment's alone.
OPERATIONS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness",
    "Posterize", "Solarize", "AutoContrast", "Equalize", "Invert",
)  # fmt: skip
NUMBER = {name: number for number, name in enumerate(OPERATIONS)}
MOVES = range(NUMBER["ShearX"], NUMBER["Rotate"] + 1)  # the operations that move pixels
