export const about = '';
export async function measure() {}
export const show = () => '';
