// Images from files, from the clipboard and from the server.

// Larger images are scaled down before they are sent: the model sees a few hundred pixels.
const MAX_SIDE = 2048;

// Redraws an image, so that the shown one equals the sent one: rotation applied, of bounded size.
export async function read(blob, name) {
  const bitmap = await createImageBitmap(blob).catch(() => {
    throw new Error(`${name || "This file"} is not an image that this browser can read.`);
  });
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // background of transparent images
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const image = new Image();
  image.src = blob.type === "image/jpeg" ? canvas.toDataURL("image/jpeg", 0.95) : canvas.toDataURL("image/png");
  await image.decode();
  return image;
}

// The first image among dropped or pasted things.
export function fileOf(transfer) {
  const files = [...(transfer?.files ?? [])];
  return files.find((file) => file.type.startsWith("image/")) ?? files[0];
}

export function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
