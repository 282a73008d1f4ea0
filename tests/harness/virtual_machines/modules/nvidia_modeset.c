// SPDX-License-Identifier: GPL-2.0 OR MIT
/* What stands between nvidia and nvidia_drm: it needs the one, and is needed by the other. */
#include <linux/cdev.h>
#include <linux/fs.h>
#include <linux/module.h>

#include "nvidia.h"

int nvkms_get(struct pci_dev *pdev)
{
	return nvidia_get(pdev);
}
EXPORT_SYMBOL(nvkms_get);

void nvkms_put(struct pci_dev *pdev)
{
	nvidia_put(pdev);
}
EXPORT_SYMBOL(nvkms_put);

void nvkms_watch(const struct nvidia_client *client)
{
	nvidia_watch(client);
}
EXPORT_SYMBOL(nvkms_watch);

void nvkms_unwatch(void)
{
	nvidia_unwatch();
}
EXPORT_SYMBOL(nvkms_unwatch);

static const struct file_operations modeset_fops = {
	.owner = THIS_MODULE,
};

static const dev_t node = MKDEV(NVIDIA_MAJOR, NVIDIA_MODESET_MINOR);
static struct cdev modeset_cdev;

static int __init modeset_init(void)
{
	int error = register_chrdev_region(node, 1, "nvidia-modeset");

	if (error)
		return error;
	cdev_init(&modeset_cdev, &modeset_fops);
	error = cdev_add(&modeset_cdev, node, 1);
	if (error)
		unregister_chrdev_region(node, 1);
	return error;
}
module_init(modeset_init);

static void __exit modeset_exit(void)
{
	cdev_del(&modeset_cdev);
	unregister_chrdev_region(node, 1);
}
module_exit(modeset_exit);

MODULE_DESCRIPTION("Test driver with the manners of NVIDIA's");
MODULE_VERSION(NVIDIA_VERSION);
MODULE_LICENSE("Dual MIT/GPL");
