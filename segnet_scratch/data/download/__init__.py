"""Downloads of VOC2012, SBD and VGG16's weights: resumed where they broke off, verified, unpacked file by file."""

from segnet_scratch.data.download.install import install_sbd, install_voc2012, pretrained_file
from segnet_scratch.data.download.sources import SBD, VOC2012

__all__ = ["SBD", "VOC2012", "install_sbd", "install_voc2012", "pretrained_file"]
