// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * A driver for QEMU's qxl display with the manners of NVIDIA's that decide whether a GPU can be let go of.
 *
 * As open-gpu-kernel-modules, kernel-open/nvidia: nodes are not in sysfs (whoever loads the module makes them, major
 * 195), /proc/driver/nvidia/gpus/BDF/information has the minor (nv-procfs.c), loading fails where there is no GPU
 * (nv.c), and remove() waits for as long as the GPU is in use (nv-pci.c).
 */
#include <linux/cdev.h>
#include <linux/delay.h>
#include <linux/fs.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>
#include <linux/slab.h>

#include "nvidia.h"

static bool interruptible;
module_param(interruptible, bool, 0644);
MODULE_PARM_DESC(interruptible, "remove() waits in state S, as NVIDIA's, so that a signal makes it spin; N: in D");

static bool refuse;
module_param(refuse, bool, 0644);
MODULE_PARM_DESC(refuse, "take no GPU any more, as where one came back from a virtual machine in no state to be used");

struct gpu {
	struct list_head list;
	struct pci_dev *pdev;
	struct proc_dir_entry *proc;
	struct page *page;
	unsigned int minor;
	atomic_t usage;
	bool leaving;
};

static LIST_HEAD(gpus);
static DEFINE_MUTEX(gpus_lock);
static const struct nvidia_client *watcher;
/* taken before gpus_lock; held while the watcher is called */
static DEFINE_MUTEX(watcher_lock);
static bool lets_go_of_one;
static struct proc_dir_entry *proc_driver, *proc_gpus;

static struct gpu *find_minor(unsigned int minor)
{
	struct gpu *gpu;

	list_for_each_entry(gpu, &gpus, list)
		if (gpu->minor == minor)
			return gpu;
	return NULL;
}

static struct gpu *find_device(struct pci_dev *pdev)
{
	struct gpu *gpu;

	list_for_each_entry(gpu, &gpus, list)
		if (gpu->pdev == pdev)
			return gpu;
	return NULL;
}

/* gpus_lock is held */
static int get(struct gpu *gpu)
{
	if (!gpu || gpu->leaving)
		return -ENODEV;
	atomic_inc(&gpu->usage);
	return 0;
}

int nvidia_get(struct pci_dev *pdev)
{
	int error;

	mutex_lock(&gpus_lock);
	error = get(find_device(pdev));
	mutex_unlock(&gpus_lock);
	return error;
}
EXPORT_SYMBOL(nvidia_get);

void nvidia_put(struct pci_dev *pdev)
{
	mutex_lock(&gpus_lock);
	atomic_dec(&find_device(pdev)->usage);
	mutex_unlock(&gpus_lock);
}
EXPORT_SYMBOL(nvidia_put);

void nvidia_watch(const struct nvidia_client *client)
{
	struct gpu *gpu;

	mutex_lock(&watcher_lock);
	watcher = client;
	/* probe() and remove() take watcher_lock around every change of the list */
	list_for_each_entry(gpu, &gpus, list)
		if (!gpu->leaving)
			client->add(gpu->pdev);
	mutex_unlock(&watcher_lock);
}
EXPORT_SYMBOL(nvidia_watch);

void nvidia_unwatch(void)
{
	struct gpu *gpu;

	mutex_lock(&watcher_lock);
	list_for_each_entry(gpu, &gpus, list)
		watcher->remove(gpu->pdev);
	watcher = NULL;
	mutex_unlock(&watcher_lock);
}
EXPORT_SYMBOL(nvidia_unwatch);

static int nvidia_open(struct inode *inode, struct file *file)
{
	unsigned int minor = iminor(inode);
	int error;

	if (minor == NVIDIA_CTL_MINOR)
		return 0;
	mutex_lock(&gpus_lock);
	file->private_data = find_minor(minor);
	error = get(file->private_data);
	mutex_unlock(&gpus_lock);
	return error;
}

static int nvidia_release(struct inode *inode, struct file *file)
{
	struct gpu *gpu = file->private_data;

	if (gpu)
		atomic_dec(&gpu->usage);
	return 0;
}

static int nvidia_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct gpu *gpu = file->private_data;

	return gpu ? vm_insert_page(vma, vma->vm_start, gpu->page) : -EINVAL;
}

static const struct file_operations nvidia_fops = {
	.owner = THIS_MODULE,
	.open = nvidia_open,
	.release = nvidia_release,
	.mmap = nvidia_mmap,
};

static struct cdev nvidia_cdevs[2];

static int show_information(struct seq_file *file, void *unused)
{
	struct gpu *gpu = file->private;

	seq_puts(file, "Model: \t\t NVIDIA GeForce QXL\n");
	seq_puts(file, "Bus Type: \t PCIe\n");
	seq_printf(file, "Bus Location: \t %s\n", pci_name(gpu->pdev));
	seq_printf(file, "Device Minor: \t %u\n", gpu->minor);
	seq_puts(file, "GPU Excluded:\t No\n");
	return 0;
}

static int nvidia_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct gpu *gpu;

	if (refuse) {
		dev_err(&pdev->dev, "RmInitAdapter failed!\n");
		return -EIO;
	}
	gpu = kzalloc(sizeof(*gpu), GFP_KERNEL);
	if (!gpu)
		return -ENOMEM;
	gpu->page = alloc_page(GFP_KERNEL | __GFP_ZERO);
	if (!gpu->page) {
		kfree(gpu);
		return -ENOMEM;
	}
	gpu->pdev = pdev;
	pci_set_drvdata(pdev, gpu);

	mutex_lock(&watcher_lock);
	mutex_lock(&gpus_lock);
	while (find_minor(gpu->minor))
		gpu->minor++;
	list_add_tail(&gpu->list, &gpus);
	mutex_unlock(&gpus_lock);
	gpu->proc = proc_mkdir(pci_name(pdev), proc_gpus);
	proc_create_single_data("information", 0444, gpu->proc, show_information, gpu);
	if (watcher)
		watcher->add(pdev);
	mutex_unlock(&watcher_lock);
	return 0;
}

/* Others let clients go and come meanwhile: neither lock is held. */
static void wait_until_unused(struct gpu *gpu)
{
	dev_err(&gpu->pdev->dev, "NVRM: Attempting to remove device %s with non-zero usage count!\n",
		pci_name(gpu->pdev));
	while (atomic_read(&gpu->usage)) {
		if (interruptible)
			msleep_interruptible(100);
		else
			msleep(100);
		cond_resched();
	}
	dev_err(&gpu->pdev->dev, "NVRM: Continuing with GPU removal for device %s\n", pci_name(gpu->pdev));
}

static void nvidia_remove(struct pci_dev *pdev)
{
	struct gpu *gpu = pci_get_drvdata(pdev);

	mutex_lock(&watcher_lock);
	mutex_lock(&gpus_lock);
	gpu->leaving = true;
	mutex_unlock(&gpus_lock);
	/* the older ones' nvidia_modeset has no way to hear of it, and keeps the GPU in use */
	if (watcher && (lets_go_of_one || !watcher->keeps))
		watcher->remove(pdev);
	mutex_unlock(&watcher_lock);

	if (atomic_read(&gpu->usage))
		wait_until_unused(gpu);

	proc_remove(gpu->proc);
	mutex_lock(&watcher_lock);
	mutex_lock(&gpus_lock);
	list_del(&gpu->list);
	mutex_unlock(&gpus_lock);
	mutex_unlock(&watcher_lock);
	__free_page(gpu->page);
	kfree(gpu);
}

static const struct pci_device_id nvidia_ids[] = {
	{ PCI_DEVICE(0x1b36, 0x0100) },
	{}
};
MODULE_DEVICE_TABLE(pci, nvidia_ids);

static struct pci_driver nvidia_driver = {
	.name = "nvidia",
	.id_table = nvidia_ids,
	.probe = nvidia_probe,
	.remove = nvidia_remove,
};

/* Two ranges, as NVIDIA's: the minor between them is nvidia_modeset's. */
static int register_nodes(void)
{
	int error;

	cdev_init(&nvidia_cdevs[0], &nvidia_fops);
	cdev_init(&nvidia_cdevs[1], &nvidia_fops);
	error = register_chrdev_region(MKDEV(NVIDIA_MAJOR, 0), NVIDIA_MODESET_MINOR, "nvidia");
	if (error)
		return error;
	error = register_chrdev_region(MKDEV(NVIDIA_MAJOR, NVIDIA_CTL_MINOR), 1, "nvidiactl");
	if (error)
		goto no_ctl;
	error = cdev_add(&nvidia_cdevs[0], MKDEV(NVIDIA_MAJOR, 0), NVIDIA_MODESET_MINOR);
	if (error)
		goto no_cdev;
	error = cdev_add(&nvidia_cdevs[1], MKDEV(NVIDIA_MAJOR, NVIDIA_CTL_MINOR), 1);
	if (!error)
		return 0;
	cdev_del(&nvidia_cdevs[0]);
no_cdev:
	unregister_chrdev_region(MKDEV(NVIDIA_MAJOR, NVIDIA_CTL_MINOR), 1);
no_ctl:
	unregister_chrdev_region(MKDEV(NVIDIA_MAJOR, 0), NVIDIA_MODESET_MINOR);
	return error;
}

static void unregister_nodes(void)
{
	cdev_del(&nvidia_cdevs[1]);
	cdev_del(&nvidia_cdevs[0]);
	unregister_chrdev_region(MKDEV(NVIDIA_MAJOR, NVIDIA_CTL_MINOR), 1);
	unregister_chrdev_region(MKDEV(NVIDIA_MAJOR, 0), NVIDIA_MODESET_MINOR);
}

static void nvidia_exit(void)
{
	pci_unregister_driver(&nvidia_driver);
	unregister_nodes();
	proc_remove(proc_driver);
}

static int __init nvidia_init(void)
{
	unsigned int major = 0, minor = 0;
	int error;

	sscanf(NVIDIA_VERSION, "%u.%u", &major, &minor);
	lets_go_of_one = major >= 590 || (major == 580 && minor >= 105);

	proc_driver = proc_mkdir("driver/nvidia", NULL);
	proc_gpus = proc_mkdir("gpus", proc_driver);
	error = register_nodes();
	if (error) {
		proc_remove(proc_driver);
		return error;
	}
	error = pci_register_driver(&nvidia_driver);
	if (error) {
		unregister_nodes();
		proc_remove(proc_driver);
		return error;
	}
	if (list_empty(&gpus)) {
		pr_info("NVRM: No NVIDIA devices probed.\n");
		nvidia_exit();
		return -ENODEV;
	}
	return 0;
}
module_init(nvidia_init);
module_exit(nvidia_exit);

MODULE_DESCRIPTION("Test driver with the manners of NVIDIA's");
MODULE_VERSION(NVIDIA_VERSION);
MODULE_LICENSE("Dual MIT/GPL");
MODULE_ALIAS_CHARDEV_MAJOR(NVIDIA_MAJOR);
