// SPDX-License-Identifier: GPL-2.0 OR MIT
/* Needs nvidia, and has nodes of its own below a major number that is given out at load, as NVIDIA's. */
#include <linux/cdev.h>
#include <linux/fs.h>
#include <linux/module.h>

#include "nvidia.h"

static const struct file_operations uvm_fops = {
	.owner = THIS_MODULE,
};

static dev_t nodes;
static struct cdev uvm_cdev;
/* the reference to a symbol of nvidia.ko that makes this module depend on it */
static void (*const needed)(struct pci_dev *) __used = nvidia_put;

static int __init uvm_init(void)
{
	int error = alloc_chrdev_region(&nodes, 0, 2, "nvidia-uvm");

	if (error)
		return error;
	cdev_init(&uvm_cdev, &uvm_fops);
	error = cdev_add(&uvm_cdev, nodes, 2);
	if (error)
		unregister_chrdev_region(nodes, 2);
	return error;
}
module_init(uvm_init);

static void __exit uvm_exit(void)
{
	cdev_del(&uvm_cdev);
	unregister_chrdev_region(nodes, 2);
}
module_exit(uvm_exit);

MODULE_DESCRIPTION("Test driver with the manners of NVIDIA's");
MODULE_VERSION(NVIDIA_VERSION);
MODULE_LICENSE("Dual MIT/GPL");
