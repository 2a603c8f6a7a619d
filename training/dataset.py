"""The place where EDM has its data set."""

from data.dataset import ImageFolderDataset as ImageFolderDataset
