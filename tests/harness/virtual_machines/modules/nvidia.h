/* SPDX-License-Identifier: GPL-2.0 OR MIT */
#ifndef NVIDIA_H
#define NVIDIA_H

#include <linux/pci.h>

#define NVIDIA_MAJOR 195
#define NVIDIA_CTL_MINOR 255
#define NVIDIA_MODESET_MINOR 254

/* nvidia.ko: somebody in the kernel uses a GPU, as one more open of its node; -ENODEV when it is on its way out. */
int nvidia_get(struct pci_dev *pdev);
void nvidia_put(struct pci_dev *pdev);

struct nvidia_client {
	void (*add)(struct pci_dev *pdev);
	void (*remove)(struct pci_dev *pdev);
	/* uses every GPU from add() to remove() */
	bool keeps;
};

/* nvidia.ko: call add() for every GPU there is and will be, remove() for those that leave. One client. */
void nvidia_watch(const struct nvidia_client *client);
void nvidia_unwatch(void);

/* nvidia_modeset.ko: the same for nvidia_drm.ko, which knows nothing of nvidia.ko. */
int nvkms_get(struct pci_dev *pdev);
void nvkms_put(struct pci_dev *pdev);
void nvkms_watch(const struct nvidia_client *client);
void nvkms_unwatch(void);

#endif
