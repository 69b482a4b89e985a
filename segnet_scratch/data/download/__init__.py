"""Downloads of VOC2012, SBD and VGG16's weights: resumed where they broke off, verified, unpacked file by file."""
