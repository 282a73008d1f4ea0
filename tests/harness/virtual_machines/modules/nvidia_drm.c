// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * The GPUs as DRM devices, with card and render nodes; opening one uses the GPU. With modeset=1 it uses every GPU all
 * the time, with fb=1 each has a frame buffer of this module, for fbcon to hold on to. Nothing is ever drawn.
 */
#include <linux/fb.h>
#include <linux/list.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/version.h>
#include <linux/vmalloc.h>
#include <drm/drm_drv.h>
#include <drm/drm_file.h>
#include <drm/drm_gem.h>
#include <drm/drm_ioctl.h>

#include "nvidia.h"

#define WIDTH 640
#define HEIGHT 480

static bool modeset;
module_param(modeset, bool, 0444);
static bool fb;
module_param(fb, bool, 0444);

struct card {
	struct list_head list;
	struct pci_dev *pdev;
	struct drm_device *drm;
	struct fb_info *fb;
	bool in_use;
};

/* only the watcher's calls, one at a time, touch it */
static LIST_HEAD(cards);

static int card_open(struct drm_device *drm, struct drm_file *file)
{
	return nvkms_get(to_pci_dev(drm->dev));
}

static void card_close(struct drm_device *drm, struct drm_file *file)
{
	nvkms_put(to_pci_dev(drm->dev));
}

DEFINE_DRM_GEM_FOPS(card_fops);

static const struct drm_driver card_driver = {
	.driver_features = DRIVER_GEM | DRIVER_RENDER,
	.open = card_open,
	.postclose = card_close,
	.fops = &card_fops,
	.name = "nvidia-drm",
	.desc = "Test driver with the manners of NVIDIA's",
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 14, 0)
	.date = "20160202",
#endif
};

static void draw_rectangle(struct fb_info *info, const struct fb_fillrect *rectangle)
{
}

static void draw_copy(struct fb_info *info, const struct fb_copyarea *area)
{
}

static void draw_image(struct fb_info *info, const struct fb_image *image)
{
}

/* when the last one who had it open is gone, too */
static void destroy_buffer(struct fb_info *info)
{
	vfree(info->screen_buffer);
	framebuffer_release(info);
}

static const struct fb_ops buffer_ops = {
	.owner = THIS_MODULE,
	.fb_destroy = destroy_buffer,
	.fb_fillrect = draw_rectangle,
	.fb_copyarea = draw_copy,
	.fb_imageblit = draw_image,
};

static struct fb_info *add_buffer(struct pci_dev *pdev)
{
	struct fb_info *info = framebuffer_alloc(16 * sizeof(u32), &pdev->dev);

	if (!info)
		return NULL;
	info->fbops = &buffer_ops;
	info->pseudo_palette = info->par;
	strscpy(info->fix.id, "nvidia-drmdrmfb", sizeof(info->fix.id));
	info->fix.type = FB_TYPE_PACKED_PIXELS;
	info->fix.visual = FB_VISUAL_TRUECOLOR;
	info->fix.line_length = WIDTH * 4;
	info->fix.smem_len = WIDTH * HEIGHT * 4;
	info->var.xres = info->var.xres_virtual = WIDTH;
	info->var.yres = info->var.yres_virtual = HEIGHT;
	info->var.bits_per_pixel = 32;
	info->var.red = (struct fb_bitfield){ 16, 8, 0 };
	info->var.green = (struct fb_bitfield){ 8, 8, 0 };
	info->var.blue = (struct fb_bitfield){ 0, 8, 0 };
	info->screen_buffer = vzalloc(info->fix.smem_len);
	if (info->screen_buffer && !register_framebuffer(info))
		return info;
	destroy_buffer(info);
	return NULL;
}

static void add_card(struct pci_dev *pdev)
{
	struct card *card = kzalloc(sizeof(*card), GFP_KERNEL);

	if (!card)
		return;
	card->pdev = pdev;
	card->drm = drm_dev_alloc(&card_driver, &pdev->dev);
	if (IS_ERR(card->drm) || drm_dev_register(card->drm, 0)) {
		dev_err(&pdev->dev, "cannot make a DRM device of it\n");
		if (!IS_ERR(card->drm))
			drm_dev_put(card->drm);
		kfree(card);
		return;
	}
	card->in_use = modeset && !nvkms_get(pdev);
	if (fb)
		card->fb = add_buffer(pdev);
	list_add(&card->list, &cards);
}

static void remove_card(struct pci_dev *pdev)
{
	struct card *card, *next;

	list_for_each_entry_safe(card, next, &cards, list) {
		if (card->pdev != pdev)
			continue;
		list_del(&card->list);
		if (card->fb)
			unregister_framebuffer(card->fb);
		if (card->in_use)
			nvkms_put(pdev);
		drm_dev_unplug(card->drm);
		drm_dev_put(card->drm);
		kfree(card);
	}
}

static struct nvidia_client client = {
	.add = add_card,
	.remove = remove_card,
};

static int __init drm_init(void)
{
	client.keeps = modeset;
	nvkms_watch(&client);
	return 0;
}
module_init(drm_init);

static void __exit drm_exit(void)
{
	nvkms_unwatch();
}
module_exit(drm_exit);

MODULE_DESCRIPTION("Test driver with the manners of NVIDIA's");
MODULE_VERSION(NVIDIA_VERSION);
MODULE_LICENSE("Dual MIT/GPL");
